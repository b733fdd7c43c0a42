"""LoRA adapters made by PEFT: computed beside the model, merged before export, served; and those that are refused."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import adapters, serving, tiny

from ov_afm import Pipeline, export
from ov_afm.cli import generate
from ov_afm.errors import ConfigError, SourceError
from ov_afm.model_dir.card import check_lines
from ov_afm.model_dir.inference import EXACT, decoder_inputs, input_names
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.runtime import lora
from ov_afm.runtime.sampling import Params

PROMPT = "What is the capital of France?"
NEW_TOKENS = 24
GREEDY = Params(max_new_tokens=NEW_TOKENS, greedy=True, ignore_eos=True, repetition_penalty=1.0)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def make_adapter(checkpoint: Path, folder: Path, seed: int = 1, **changes: Any) -> Path:
    return adapters.write(checkpoint, folder, seed, **{"target_modules": TARGETS, **changes})


@pytest.fixture(scope="module")
def make(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    return lambda name, **changes: make_adapter(tiny_checkpoint, tmp_path_factory.mktemp("adapters") / name, **changes)


@pytest.fixture(scope="module")
def adapter(make: Callable[..., Path]) -> Path:
    return make("plain")


def with_peft(checkpoint: Path, folders: Sequence[Path], weight: float = 1) -> Any:
    """Transformers' model with adapters applied by PEFT, at f32."""
    import peft

    model = adapters.attached(checkpoint, *folders)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.scale_layer(weight)
    return model


def tokenizer_of(checkpoint: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


def greedy_text(checkpoint: Path, model: Any) -> str:
    """What transformers answers."""
    tokenizer = tokenizer_of(checkpoint)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=2)
    text = str(tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
    # A character whose last bytes did not come.
    return text.rstrip("\ufffd")


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path, adapter: Path) -> str:
    return greedy_text(tiny_checkpoint, with_peft(tiny_checkpoint, [adapter]))


@pytest.mark.parametrize("given", [{}, {"ATTENTION_BACKEND": "SDPA"}, {"prompt_lookup": True}], ids=str)
def test_adapted_answer_is_transformers_and_pefts(
    tiny_fp32: Path, adapter: Path, expected: str, given: dict[str, Any]
) -> None:
    with Pipeline(tiny_fp32, adapters=[adapter], **EXACT, **given) as pipeline:
        assert pipeline.generate(PROMPT, GREEDY, raw=True).text == expected
    with Pipeline(tiny_fp32, **EXACT) as plain:
        assert plain.generate(PROMPT, GREEDY, raw=True).text != expected


def test_adapter_works_on_the_emulated_npu(tiny_fp32: Path, adapter: Path, expected: str) -> None:
    limits = {"MAX_PROMPT_LEN": 128, "MIN_RESPONSE_LEN": 64}
    with Pipeline(tiny_fp32, "NPU-EMULATED", adapters=[adapter], **limits, **EXACT) as pipeline:
        assert pipeline.emulated
        assert pipeline.generate(PROMPT, GREEDY, raw=True).text == expected


def test_weight_scales_and_several_add_up(
    tiny_checkpoint: Path, tiny_fp32: Path, adapter: Path, make: Callable[..., Path]
) -> None:
    other = make("other", seed=2, r=2, target_modules=["up_proj", "q_proj"])
    both = [f"{adapter}:0.5", f"{other / 'adapter_model.safetensors'}:0.5"]
    wanted = greedy_text(tiny_checkpoint, with_peft(tiny_checkpoint, [adapter, other], 0.5))
    with Pipeline(tiny_fp32, adapters=both, **EXACT) as pipeline:
        assert pipeline.generate(PROMPT, GREEDY, raw=True).text == wanted


def test_stabilized_rank_scales_by_its_root(tiny_checkpoint: Path, tiny_fp32: Path, make: Callable[..., Path]) -> None:
    folder = make("rslora", use_rslora=True)
    with Pipeline(tiny_fp32, adapters=[folder], **EXACT) as pipeline:
        answer = pipeline.generate(PROMPT, GREEDY, raw=True).text
    assert answer == greedy_text(tiny_checkpoint, with_peft(tiny_checkpoint, [folder]))


def test_generate_takes_an_adapter(tiny_fp32: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [part for key, value in EXACT.items() for part in ("--ov-config", f"{key}={value}")]
    sampling = ["--raw", "--greedy", "--max-new-tokens", str(NEW_TOKENS)]
    assert generate.main([str(tiny_fp32), PROMPT, "--adapter", f"{adapter}:0.5", *settings, *sampling]) == 0
    with Pipeline(tiny_fp32, adapters=[f"{adapter}:0.5"], **EXACT) as pipeline:
        wanted = pipeline.generate(PROMPT, Params(max_new_tokens=NEW_TOKENS, greedy=True), raw=True).text
    assert capsys.readouterr().out == f"{wanted}\n"


def logits(model_dir: Path, ids: list[int]) -> Any:
    """Of the last position, on CPU at f32."""
    import openvino

    compiled = openvino.Core().compile_model(model_dir / "openvino_model.xml", "CPU", EXACT)
    return compiled(decoder_inputs(ids, input_names(compiled)))["logits"][0, -1]


@pytest.mark.slow
def test_merged_export_has_the_logits_of_peft(tiny_checkpoint: Path, make: Callable[..., Path], tmp_path: Path) -> None:
    import torch

    # Scales that differ by module, and a whole matrix that comes with the adapter.
    folder = make("patterns", alpha_pattern={"up_proj": 3}, rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"])
    made = export(tiny_checkpoint, tmp_path / "merged", recipe="fp32", adapters=[folder], golden=False)
    ids = tokenizer_of(tiny_checkpoint)(PROMPT).input_ids
    with torch.no_grad():
        wanted = with_peft(tiny_checkpoint, [folder])(torch.tensor([ids])).logits[0, -1].numpy()
    assert np.abs(logits(made.path, ids) - wanted).max() < 1e-4
    (recorded,) = made.manifest.source["adapters"]
    assert (recorded["name"], recorded["weight"]) == ("patterns", 1)
    assert made.manifest.checks["export_parity"]["top1_agreement"] == 1
    assert made.manifest.checks["adapters"]["top1_agreement"] == 1
    assert "merged adapters against PEFT: largest difference" in "\n".join(check_lines(made.manifest.checks))
    # The same again is done already; the model without the adapter is another one.
    again = export(tiny_checkpoint, made.path, recipe="fp32", adapters=[folder], golden=False)
    assert again.log is None
    with pytest.raises(ConfigError, match="holds another model"):
        export(tiny_checkpoint, made.path, recipe="fp32")


def test_adapter_whose_parts_differ_is_only_merged(tiny_fp32: Path, make: Callable[..., Path]) -> None:
    folder = make("uneven", alpha_pattern={"up_proj": 3})
    with pytest.raises(SourceError, match="scales its modules differently, which works only merged; run: "):
        Pipeline(tiny_fp32, adapters=[folder])


MERGED_ONLY: dict[str, tuple[dict[str, Any], str]] = {
    "whole module": ({"modules_to_save": ["lm_head"]}, "replaces lm_head.weight"),
    "rows": ({"trainable_token_indices": [3]}, "replaces model.embed_tokens"),
    "embedding": ({"target_modules": ["embed_tokens"]}, "replaces model.embed_tokens.weight"),
    "copy of the head": ({"target_modules": ["lm_head"]}, r"replaces lm_head.weight.*save_embedding_layers=False\)"),
    "dora": ({"use_dora": True}, "uses DoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, "starts from pissa, which changed the base model"),
    "olora": ({"init_lora_weights": "olora"}, "starts from olora"),
    "bias": ({"lora_bias": True}, "has biases"),
}


@pytest.mark.parametrize(("changes", "reason"), MERGED_ONLY.values(), ids=MERGED_ONLY)
def test_what_an_engine_cannot_compute_is_only_merged(
    make: Callable[..., Path], tiny_fp32: Path, changes: dict[str, Any], reason: str, request: pytest.FixtureRequest
) -> None:
    folder = make(request.node.callspec.id.replace(" ", "-"), **changes)
    with pytest.raises(SourceError, match=reason) as caught:
        lora.check(lora.read(folder), ModelDirectory.open(tiny_fp32))
    assert caught.value.code == "adapter-only-merged"
    assert "works only merged; run: ov-afm export MODEL --merge-adapter FILE" in str(caught.value)


def test_head_is_adapted_beside_the_model(tiny_checkpoint: Path, tiny_fp32: Path, make: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = make(
        "head", target_modules=["q_proj", "lm_head"], rank_pattern={"lm_head": 2}, alpha_pattern={"lm_head": 6}
    )
    # As saved with save_embedding_layers=False, and in half precision.
    tensors = load_file(folder / lora.WEIGHTS)
    save_file(
        {name: value.bfloat16() for name, value in tensors.items() if "base_layer" not in name}, folder / lora.WEIGHTS
    )
    with Pipeline(tiny_fp32, adapters=[folder], **EXACT) as pipeline:
        answer = pipeline.generate(PROMPT, GREEDY, raw=True).text
    assert answer.rstrip("\ufffd") == greedy_text(tiny_checkpoint, with_peft(tiny_checkpoint, [folder]))


def test_adapter_that_lost_a_module_is_refused(make: Callable[..., Path], tiny_fp32: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make("lost")
    tensors = load_file(folder / lora.WEIGHTS)
    save_file({name: value for name, value in tensors.items() if "layers.1.mlp.up" not in name}, folder / lora.WEIGHTS)
    with pytest.raises(SourceError, match=r"lacks model.layers.1.mlp.up_proj \(1 of 12 modules that") as caught:
        lora.check(lora.read(folder), ModelDirectory.open(tiny_fp32))
    assert caught.value.code == "adapter-incomplete"


@pytest.mark.parametrize(
    ("base", "model", "same"),
    [
        ("arcee-ai/AFM-4.5B", "arcee-ai/AFM-4.5B", True),
        ("/home/me/AFM-4.5B/", "arcee-ai/AFM-4.5B", True),
        ("C:\\models\\afm-4.5b", "AFM-4.5B.gguf", True),
        ("unsloth/AFM-4.5B-unsloth-bnb-4bit", "arcee-ai/AFM-4.5B", True),
        ("/cache/models--arcee-ai--AFM-4.5B/snapshots/5c1b", "arcee-ai/AFM-4.5B", True),
        (None, "arcee-ai/AFM-4.5B", True),
        ("arcee-ai/AFM-4.5B-Base", "arcee-ai/AFM-4.5B", False),
        ("/home/me/checkpoint-500", "arcee-ai/AFM-4.5B", False),
    ],
)
def test_another_base_model_is_said(adapter: Path, tmp_path: Path, base: str | None, model: str, same: bool) -> None:
    folder = shutil.copytree(adapter, tmp_path / "tuned")
    _configure(folder, base_model_name_or_path=base)
    warning = lora.another_base(lora.read(folder), model)
    assert (warning is None) == same
    assert same or (repr(base) in str(warning) and repr(model) in str(warning))


def test_tokenizer_beside_an_adapter_is_not_used_in_silence(
    adapter: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tiny_checkpoint / name, folder / name)
    assert lora.unused_files(lora.read(folder), tiny_checkpoint) == []
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 512, "content": "<|new|>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    template, tokens = lora.unused_files(lora.read(folder), tiny_checkpoint)
    assert "another chat template" in template
    assert "1 tokens" in tokens and "'<|new|>'" in tokens


def test_adapter_and_draft_model_exclude_each_other(tiny_fp32: Path, adapter: Path) -> None:
    with pytest.raises(ConfigError, match="adapters and a draft model exclude each other"):
        Pipeline(tiny_fp32, adapters=[adapter], draft_model=tiny_fp32)


def test_adapter_of_another_size_is_refused(adapter: Path, tmp_path: Path, tiny_fp32: Path) -> None:
    model = shutil.copytree(tiny_fp32, tmp_path / "wide")
    tiny.edit_json(model / "config.json", intermediate_size=256)
    with pytest.raises(SourceError, match=r"has 128 inputs and 64 outputs, in wide they are 256 and 64; it was made"):
        lora.check(lora.read(adapter), ModelDirectory.open(model))


def test_adapter_of_a_deeper_model_is_refused(make: Callable[..., Path], tiny_fp32: Path, tmp_path: Path) -> None:
    deep = tiny.write_arcee(tmp_path / "deep", num_hidden_layers=3)
    folder = make_adapter(deep, tmp_path / "adapter")
    with pytest.raises(SourceError, match=r"changes model.layers.2.\S+, which tiny-fp32 does not have; it was"):
        Pipeline(tiny_fp32, adapters=[folder])


def _cut(folder: Path) -> None:
    path = folder / lora.WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])


def _no_tensors(folder: Path) -> None:
    (folder / lora.WEIGHTS).write_bytes(b"\0" * 40)


def _configure(folder: Path, **changes: Any) -> None:
    tiny.edit_json(folder / lora.CONFIG, **changes)


def _rename(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = folder / lora.WEIGHTS
    save_file({name.replace("lora_A", "lora_embedding_A"): each for name, each in load_file(path).items()}, path)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (shutil.rmtree, r"no such adapter: \S+; give PEFT's adapter_model.safetensors or its folder"),
    "cut off": (_cut, r"is damaged or no safetensors file .* PEFT's adapter_model.safetensors: fetch it again"),
    "no safetensors": (_no_tensors, r"is damaged or no safetensors file"),
    "no configuration": (lambda folder: (folder / lora.CONFIG).unlink(), r"is missing, and with it .* lora_alpha"),
    "broken configuration": (
        lambda folder: (folder / lora.CONFIG).write_text("{"),
        r"is not PEFT's configuration of a LoRA: JSONDecodeError",
    ),
    "no alpha": (functools.partial(_configure, lora_alpha=None), r"is not PEFT's configuration .* 'lora_alpha'"),
    "names of no module": (_rename, r"lora_embedding_A.weight', which is no tensor of PEFT's LoRA"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_unusable_adapter_is_named(
    adapter: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    spoil(folder)
    with pytest.raises(SourceError, match=message) as caught:
        lora.read(folder)
    assert "\n" not in str(caught.value)


def test_weight_must_be_finite(adapter: Path) -> None:
    with pytest.raises(ConfigError, match="the weight of an adapter is a finite number, found nan"):
        lora.read(f"{adapter}:nan")


def test_colon_in_a_name_is_no_weight(adapter: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter, tmp_path / "run:2")
    assert lora.read(folder).weight == 1
    assert lora.read(f"{folder}:0.25").weight == 0.25


@pytest.mark.slow
def test_server_offers_an_adapter_as_a_model(tiny_model: Path, adapter: Path, tiny_checkpoint: Path) -> None:
    body = {"prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0}
    with Pipeline(tiny_model, adapters=[adapter]) as pipeline:
        wanted = pipeline.generate(PROMPT, Params(max_new_tokens=NEW_TOKENS, greedy=True), raw=True).text
    with serving.server("--model", f"base={tiny_model}", "--adapter", f"tuned={adapter}", *SMALL) as server:
        assert [each["id"] for each in server.http.get("/v1/models").json()["data"]] == ["base", "tuned"]
        answers = {name: _completion(server, model=name, **body) for name in ("base", "tuned", "base", "tuned")}
    assert answers["tuned"] == wanted != answers["base"]


SMALL = ("--cache-size-gb", "0.02")


def _completion(server: serving.Server, **body: Any) -> str:
    answer = server.post("/v1/completions", **body)
    assert answer.status_code == 200, answer.text
    return str(json.loads(answer.text)["choices"][0]["text"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("base", "'base' names a model and an adapter; give the adapter another name"),
        ("a b", "a model's name is letters, digits and . _ : / -, found 'a b'; use --adapter NAME=FILE"),
    ],
    ids=["taken", "bad"],
)
def test_adapter_needs_a_name_of_its_own(
    tiny_model: Path, adapter: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    from ov_afm.cli import serve

    assert serve.main(["--model", f"base={tiny_model}", "--adapter", f"{name}={adapter}"]) == 1
    assert capsys.readouterr().err == f"ov-afm: error: {message}\n"
