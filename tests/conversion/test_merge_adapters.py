"""Merged adapters against PEFT, form by form; those that cannot be merged are refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from support import adapters, tiny

from ov_afm.conversion import merge_adapters
from ov_afm.errors import ConfigError, SourceError
from ov_afm.runtime import lora

pytestmark = pytest.mark.slow

IDS = [(7 * i * i + 3 * i + 11) % 500 for i in range(1, 41)]
HEAD = f"{lora.PREFIX}lm_head.weight"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def write_base(folder: Path, arch: str = "Arcee", **changes: Any) -> Path:
    """A random checkpoint without tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{arch}Config")(**{**tiny.ARCEE, **changes})
    getattr(transformers, f"{arch}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "tied": write_base(folder / "tied", tie_word_embeddings=True),
        "untied": write_base(folder / "untied"),
        "biased": write_base(folder / "biased", "Llama", attention_bias=True),
    }


def merged(base: Path, *given: str | Path) -> Any:
    model = adapters.read_model(base)
    merge_adapters.merge(model, lora.read_all(given))
    return model


def close(measured: Any, expected: Any, bound: float = 1e-5) -> bool:
    return bool(np.abs(measured - expected).max() <= bound * np.abs(expected).max())


FORMS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL},
    "pattern": {"target_modules": r".*layers\.[01]\.(self_attn|mlp)\.\w+_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "rslora": {"use_rslora": True},
    "rank and alpha by module": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
    "one layer": {"layers_to_transform": 1},
    "layers of a list": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "excluded": {"target_modules": ALL, "exclude_modules": ["down_proj", "model.layers.0.self_attn.q_proj"]},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "dora on the embedding": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "dora on the head": {"use_dora": True, "target_modules": ["q_proj", "lm_head"]},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ALL},
    "pissa and rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa on the head": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "lm_head"]},
    "pissa on the embedding": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
    "olora": {"init_lora_weights": "olora", "target_modules": ALL},
    "olora on the head": {"init_lora_weights": "olora", "target_modules": ["q_proj", "lm_head"]},
    "velora": {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=8)},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "lora on both, kept tied": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved both, kept tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "saved norms": {"modules_to_save": ["norm"]},
    "saved MLPs": {"target_modules": ALL, "modules_to_save": ["mlp"]},
    "saved head, embedding with lora": {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 500, 2, 14]},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": [3, 21], "lm_head": [3, 7]}},
    "same tokens of both": {"trainable_token_indices": {"embed_tokens": [21, 3], "lm_head": [21, 3]}},
    "tokens, head with lora": {"trainable_token_indices": {"embed_tokens": [3, 21]}, "target_modules": ["lm_head"]},
}
SHARED = [name for name in FORMS if any(word in name for word in ("head", "embedding", "both", "tokens"))]
# Of these, forms that leave embedding and head one matrix, where they are one.
STAY_TIED = {name for name in FORMS if "kept tied" in name or name in ("tokens", "same tokens of both")}


@pytest.mark.parametrize(
    ("base", "form"), [*(("untied", name) for name in FORMS), *(("tied", name) for name in SHARED)], ids=str
)
def test_merged_model_has_the_logits_of_peft(bases: Mapping[str, Path], tmp_path: Path, base: str, form: str) -> None:
    folder = adapters.write(bases[base], tmp_path / "adapter", **FORMS[form])
    expected = adapters.logits(adapters.attached(bases[base], folder), IDS)
    model = merged(bases[base], folder)
    assert not close(adapters.logits(adapters.read_model(bases[base]), IDS), expected), "the adapter does nothing"
    # PEFT decomposes matrices at f32 to know what the adapter started with.
    bound = 1e-4 if FORMS[form].get("init_lora_weights") in ("pissa", "olora") else 1e-5
    assert close(adapters.logits(model, IDS), expected, bound)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings == (base == "tied" and form in STAY_TIED)


def test_trained_biases_are_merged(bases: Mapping[str, Path], tmp_path: Path) -> None:
    for changes in ({"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True, "target_modules": ["q_proj"]}):
        folder = adapters.write(bases["biased"], tmp_path / "-".join(changes), **changes)
        expected = adapters.logits(adapters.attached(bases["biased"], folder), IDS)
        assert close(adapters.logits(merged(bases["biased"], folder), IDS), expected), changes


def test_two_adapters_add_up_with_their_weights(bases: Mapping[str, Path], tmp_path: Path) -> None:
    one = adapters.write(bases["tied"], tmp_path / "one", target_modules=ALL)
    two = adapters.write(bases["tied"], tmp_path / "two", 2, r=2, modules_to_save=["norm"])
    both = adapters.attached(bases["tied"], one, two)
    for module in both.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and "0" in module.scaling:
            module.scaling["0"] *= 0.5
    assert close(adapters.logits(merged(bases["tied"], f"{one}:0.5", two), IDS), adapters.logits(both, IDS))


def test_merge_in_half_precision_rounds_once(bases: Mapping[str, Path], tmp_path: Path) -> None:
    import torch

    for name, changes in {"pissa": {"init_lora_weights": "pissa"}, "head": {"target_modules": ["lm_head"]}}.items():
        folder = adapters.write(bases["tied"], tmp_path / name, **changes)
        model = adapters.read_model(bases["tied"]).bfloat16()
        exact = merged_state(model.float(), folder)
        rounded = merged_state(model.bfloat16(), folder)
        assert all(torch.equal(rounded[key], value.bfloat16()) for key, value in exact.items())


def merged_state(model: Any, folder: Path) -> dict[str, Any]:
    import copy

    model = copy.deepcopy(model)
    merge_adapters.merge(model, [lora.read(folder)])
    return model.state_dict()


# -- What is refused


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / lora.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / lora.WEIGHTS)
    change(tensors)
    save_file({name: value.clone() for name, value in tensors.items()}, folder / lora.WEIGHTS)


def drop(word: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if word in name]


@pytest.fixture(scope="module")
def plain(bases: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.write(bases["untied"], tmp_path_factory.mktemp("plain") / "plain", modules_to_save=["lm_head"])


UNREADABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ia3": ("adapter-kind", "IA3", {"peft_type": "IA3"}),
    "prompt tuning": ("adapter-kind", "PROMPT_TUNING", {"peft_type": "PROMPT_TUNING"}),
    "mlx": ("adapter-config-unreadable", "peft_type", {"peft_type": ...}),
    "alora": ("adapter-unsupported", "alora_invocation_tokens", {"alora_invocation_tokens": [3, 4]}),
    "replicated layers": ("adapter-unsupported", "layer_replication", {"layer_replication": [[0, 2], [1, 2]]}),
    "parameters": ("adapter-unsupported", "target_parameters", {"target_parameters": ["up_proj.weight"]}),
    "kasa": ("adapter-unsupported", "kasa_config", {"kasa_config": {"beta": 1e-4}}),
    "blocks": ("adapter-unsupported", "use_bdlora", {"use_bdlora": {"nblocks": 2}}),
    "qalora": ("adapter-unsupported", "use_qalora", {"use_qalora": True}),
    "megatron": ("adapter-unsupported", "megatron_config", {"megatron_config": {"a": 1}}),
    "arrow": ("adapter-unsupported", "arrow_config", {"arrow_config": {"top_k": 1}}),
    "monteclora": ("adapter-unsupported", "monteclora_config", {"monteclora_config": {"a": 1}}),
    "fast pissa": ("adapter-start", "pissa_niter_4", {"init_lora_weights": "pissa_niter_4"}),
    "corda": ("adapter-start", "corda", {"init_lora_weights": "corda"}),
    "loftq": ("adapter-start", "LoftQ", {"init_lora_weights": "loftq"}),
    "lora-ga": ("adapter-start", "lora_ga", {"init_lora_weights": "lora_ga"}),
    "start of tomorrow": ("adapter-start", "'newest'", {"init_lora_weights": "newest"}),
    "field of tomorrow": ("adapter-field-unknown", "use_newest", {"use_newest": True}),
    "list of tomorrow": ("adapter-field-unknown", "newest", {"newest": ["q_proj"]}),
    "no targets": ("adapter-config-unreadable", "target_modules", {"target_modules": None}),
    "broken pattern": ("adapter-config-unreadable", "error", {"target_modules": "(q_proj"}),
    "broken pattern of ranks": ("adapter-config-unreadable", "error", {"rank_pattern": {"q_proj": 4, "(": 2}}),
    "lines": ("adapter-field-unknown", "'a\\nb'", {"a\nb": "c\nd"}),
    "number for targets": ("adapter-config-unreadable", "TypeError", {"target_modules": 5}),
    "alpha of no number": ("adapter-config-unreadable", "lora_alpha", {"lora_alpha": float("nan")}),
    "rank zero": ("adapter-config-unreadable", "rank", {"r": 0}),
    "token twice": ("adapter-config-unreadable", "token twice", {"trainable_token_indices": [3, 3]}),
    "other targets": ("adapter-inconsistent", "target_modules", {"target_modules": ["q_proj"]}),
    "excluded": ("adapter-inconsistent", "up_proj", {"exclude_modules": ["up_proj"]}),
    "other layers": ("adapter-inconsistent", "layers.1", {"layers_to_transform": [0]}),
    "other rank": ("adapter-inconsistent", "rank 4", {"r": 8}),
    "other rank of one": ("adapter-inconsistent", "rank 4", {"rank_pattern": {"layers.1.mlp.up_proj": 2}}),
    "dora without magnitudes": ("adapter-inconsistent", "lora_magnitude_vector", {"use_dora": True}),
    "tokens without rows": ("adapter-incomplete", "embed_tokens", {"trainable_token_indices": [3]}),
}


@pytest.mark.parametrize(("code", "fact", "changes"), UNREADABLE.values(), ids=UNREADABLE)
def test_configuration_that_would_be_ignored_is_refused(
    plain: Path, tmp_path: Path, code: str, fact: str, changes: dict[str, Any]
) -> None:
    folder = shutil.copytree(plain, tmp_path / "adapter")
    fields = {**json.loads((folder / lora.CONFIG).read_text()), **changes}
    (folder / lora.CONFIG).write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))
    with pytest.raises(SourceError) as caught:
        lora.read(folder)
    assert (caught.value.code, fact in str(caught.value)) == (code, True), caught.value
    assert "\n" not in str(caught.value)


def test_harmless_fields_are_taken(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "adapter")
    empty = {"use_newest": False, "newest_config": None, "newest_list": [], "alora_invocation_tokens": None}
    edit_config(folder, **empty, lora_dropout=0.1, task_type="CAUSAL_LM", eva_config={"rho": 2.0}, qalora_group_size=64)
    assert dataclasses.replace(lora.read(folder).config, path=plain) == dataclasses.replace(
        lora.read(plain).config, path=plain
    )


FILES: dict[str, tuple[str, str, Callable[[dict[str, Any]], object]]] = {
    "unknown tensor": (
        "adapter-tensor-unknown",
        "lora_C",
        lambda tensors: tensors.update({f"{lora.PREFIX}x.lora_C.weight": tensors[HEAD]}),
    ),
    "names of another program": (
        "adapter-tensor-unknown",
        "layers.0",
        lambda tensors: tensors.update({"layers.0.q_proj.lora_a": tensors[HEAD]}),
    ),
    "one half": ("adapter-incomplete", "do not fit each other", drop("layers.0.mlp.up_proj.lora_A")),
    "weight beside LoRA": (
        "adapter-inconsistent",
        "up_proj.weight",
        lambda tensors: tensors.update({f"{lora.PREFIX}model.layers.0.mlp.up_proj.weight": tensors[HEAD]}),
    ),
    "magnitude without DoRA": (
        "adapter-inconsistent",
        "lora_magnitude_vector",
        lambda tensors: tensors.update(
            {
                f"{lora.PREFIX}model.layers.0.mlp.up_proj.lora_magnitude_vector": tensors[
                    f"{lora.PREFIX}lm_head.weight"
                ][0]
            }
        ),
    ),
    "rows without tokens": (
        "adapter-inconsistent",
        "trainable_token_indices",
        lambda tensors: tensors.update(
            {
                f"{lora.PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": tensors[
                    f"{lora.PREFIX}lm_head.weight"
                ][:2]
            }
        ),
    ),
    "integers": ("adapter-type", "I32", lambda tensors: tensors.update({key: tensors[key].int() for key in tensors})),
    "no LoRA": ("adapter-empty", "no lora_A", drop("lora_")),
}


@pytest.mark.parametrize(("code", "fact", "change"), FILES.values(), ids=FILES)
def test_tensors_that_would_be_ignored_are_refused(
    plain: Path, tmp_path: Path, code: str, fact: str, change: Callable[[dict[str, Any]], object]
) -> None:
    folder = shutil.copytree(plain, tmp_path / "adapter")
    edit_tensors(folder, change)
    with pytest.raises(SourceError) as caught:
        lora.read(folder)
    assert (caught.value.code, fact in str(caught.value)) == (code, True), caught.value


def grow(tensors: dict[str, Any]) -> None:
    import torch

    tensors[HEAD] = torch.cat([tensors[HEAD], tensors[HEAD][:8]])


MISMATCHES: dict[str, tuple[str, str, Callable[[dict[str, Any]], object]]] = {
    "layer lost": ("adapter-incomplete", "1 of 4 modules", drop("layers.0.mlp.up_proj")),
    "saved module lost": ("adapter-incomplete", "modules_to_save", drop("lm_head")),
    "more tokens": ("adapter-of-another-model", "has 520 tokens in lm_head.weight, and this model 512", grow),
    "other inputs": (
        "adapter-of-another-model",
        "up_proj",
        lambda tensors: [tensors.update({key: tensors[key][:, :32]}) for key in tensors if "up_proj.lora_A" in key],
    ),
    "another layer": (
        "adapter-of-another-model",
        "layers.7",
        lambda tensors: [
            tensors.update({key.replace("layers.1", "layers.7"): tensors.pop(key)})
            for key in list(tensors)
            if "layers.1" in key
        ],
    ),
}


@pytest.mark.parametrize(("code", "fact", "change"), MISMATCHES.values(), ids=MISMATCHES)
def test_adapter_that_does_not_fit_the_model_is_refused(
    bases: Mapping[str, Path],
    plain: Path,
    tmp_path: Path,
    code: str,
    fact: str,
    change: Callable[[dict[str, Any]], object],
) -> None:
    folder = shutil.copytree(plain, tmp_path / "adapter")
    edit_tensors(folder, change)
    with pytest.raises(SourceError) as caught:
        merged(bases["untied"], folder)
    assert (caught.value.code, fact in str(caught.value)) == (code, True), caught.value


def test_adapter_of_a_tied_model_is_refused_by_an_untied_one(bases: Mapping[str, Path], tmp_path: Path) -> None:
    folder = adapters.write(bases["tied"], tmp_path / "adapter", **FORMS["lora on both, kept tied"])
    with pytest.raises(SourceError, match="LoRA of lm_head, which PEFT ignores"):
        merged(bases["untied"], folder)


def test_bias_of_a_layer_without_one_is_refused(bases: Mapping[str, Path], tmp_path: Path) -> None:
    folder = adapters.write(bases["untied"], tmp_path / "adapter", lora_bias=True)
    with pytest.raises(SourceError, match="adds a bias to .*up_proj, which has none"):
        merged(bases["untied"], folder)


@pytest.mark.parametrize("form", ["dora", "pissa", "saved head", "tokens"])
def test_what_is_no_sum_has_weight_one_and_stands_alone(bases: Mapping[str, Path], tmp_path: Path, form: str) -> None:
    folder = adapters.write(bases["tied"], tmp_path / "adapter", **FORMS[form])
    with pytest.raises(ConfigError, match=r"only be applied with weight 1, found 0.5"):
        lora.read(f"{folder}:0.5")
    other = adapters.write(bases["tied"], tmp_path / "other", target_modules=["q_proj", "embed_tokens"])
    for pair in ((folder, other), (other, folder)):
        with pytest.raises(SourceError) as caught:
            merged(bases["tied"], *pair)
        assert caught.value.code == "adapters-conflict"


def test_pickled_adapter_names_the_command_that_converts_it(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    folder = shutil.copytree(plain, tmp_path / "adapter")
    torch.save(load_file(folder / lora.WEIGHTS), folder / "adapter_model.bin")
    (folder / lora.WEIGHTS).unlink()
    for given in (folder, folder / "adapter_model.bin", folder / lora.WEIGHTS):
        with pytest.raises(SourceError) as caught:
            lora.read(given)
        assert caught.value.code == "adapter-pickled"
    code = str(caught.value).partition('python -c "')[2].rstrip('"')
    monkeypatch.chdir(folder)
    exec(code)
    assert lora.read(folder).low_rank == lora.read(plain).low_rank


# -- The proof


def test_proof_compares_with_peft_and_says_so(bases: Mapping[str, Path], tmp_path: Path) -> None:
    folder = adapters.write(bases["tied"], tmp_path / "adapter", trainable_token_indices=[501, 7])
    check = merge_adapters.compare(lambda: adapters.read_model(bases["tied"]), [lora.read(folder)])
    assert (check["tokens"], check["top1_agreement"], check["peft"]) == (66, 1.0, peft.__version__)


def test_wrong_merge_is_no_export(bases: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ov_afm.errors import ExportError

    folder = adapters.write(bases["untied"], tmp_path / "adapter", init_lora_weights="pissa")
    # As it was: applied as if it were plain LoRA.
    monkeypatch.setattr(merge_adapters, "_residual", lambda weight, *_: weight)
    with pytest.raises(ExportError, match=r"the merged model is not what PEFT computes: logits differ"):
        merge_adapters.compare(lambda: adapters.read_model(bases["untied"]), [lora.read(folder)])


def test_proof_without_peft_says_what_to_install(
    bases: Mapping[str, Path], plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check = merge_adapters.compare(lambda: pytest.fail("nothing to load"), [lora.read(plain)])
    assert check == {"skipped": "peft is not installed (pip install 'ov-afm[heal]')"}
