"""Verification can fail: each kind of wrong export has its one-line error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import templates, tiny

from ov_afm.conversion import convert, verify
from ov_afm.errors import ExportError
from ov_afm.presets import RECIPES
from ov_afm.runtime.text_proof import CONVERSATIONS, TEXTS


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> Any:
    """The source in transformers, f32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype="float32").eval()


@pytest.fixture
def model_dir(tiny_fp32: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(tiny_fp32, tmp_path / "model"))


def error_of(code: str, function: Any, *arguments: Any) -> str:
    with pytest.raises(ExportError) as caught:
        function(*arguments)
    assert caught.value.code == code
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_right_export_passes(tiny_checkpoint: Path, tiny_fp32: Path) -> None:
    checks = verify.tokenizer_equal(tiny_checkpoint, tiny_fp32)
    template = checks["chat_template"]
    assert template["conversations"] == 2 * len(CONVERSATIONS)
    assert (template["refused_by_source"], template["equal"]) == (0, True)
    assert "genai_differs" not in template
    assert checks["tokenizer"]["texts"] == len(TEXTS)
    assert checks["tokenizer"]["tokens"] > 500


def change_template(model_dir: Path, old: str, new: str) -> None:
    """Change the template wherever a model directory keeps it: its own file and the tokenizer's IR."""
    path = model_dir / "chat_template.jinja"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    ir = model_dir / "openvino_tokenizer.xml"
    ir.write_text(ir.read_text().replace(old, new))


def test_tampered_chat_template_is_found_at_its_character(tiny_checkpoint: Path, model_dir: Path) -> None:
    change_template(model_dir, "assistant", "Assistant")
    assert error_of("chat-template-differs", verify.tokenizer_equal, tiny_checkpoint, model_dir) == (
        "the exported chat template differs from the source's at character 70: "
        "'Assistant\\n' where the source renders 'assistant\\n'"
    )


def write_tokenizer(model_dir: Path, checkpoint: Path, change: Any) -> None:
    """Convert a changed copy of the source's tokenizer into the model directory."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    copy = model_dir.parent / "changed"
    shutil.copytree(checkpoint, copy)
    text = (copy / "tokenizer.json").read_text()
    changed = change(text)
    assert changed != text
    (copy / "tokenizer.json").write_text(changed)
    models = convert_tokenizer(AutoTokenizer.from_pretrained(copy), with_detokenizer=True)
    for model, name in zip(models, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
        openvino.save_model(model, model_dir / f"{name}.xml")


def test_tampered_tokenizer_is_found_with_both_ids(tiny_checkpoint: Path, model_dir: Path) -> None:
    write_tokenizer(model_dir, tiny_checkpoint, lambda text: text.replace('"use_regex": true', '"use_regex": false'))
    message = error_of("tokenizer-differs", verify.tokenizer_equal, tiny_checkpoint, model_dir)
    assert message.startswith("the exported tokenizer differs from the source's at token ")
    assert " where the source gives [" in message


def test_tampered_detokenizer_is_found(tiny_checkpoint: Path, model_dir: Path) -> None:
    path = model_dir / "openvino_detokenizer.bin"
    content = path.read_bytes()
    assert content.count(b"The") == 1
    path.write_bytes(content.replace(b"The", b"Xhe"))
    message = error_of("detokenizer-differs", verify.tokenizer_equal, tiny_checkpoint, model_dir)
    assert message.startswith("the exported detokenizer gives ")


def test_bits_of_every_matrix_are_compared(tiny_fp32: Path, reference: Any) -> None:
    found = verify.weights_equal(reference, tiny_fp32 / "openvino_model.xml")
    assert found == {"matrices": 14, "on_sampled_rows": 0, "equal": True}


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_one_flipped_bit_in_a_weight_is_found_and_named(model_dir: Path, reference: Any, name: str) -> None:
    wanted = reference.state_dict()[name].numpy().tobytes()
    content = bytearray((model_dir / "openvino_model.bin").read_bytes())
    at = content.find(wanted)
    assert at >= 0
    content[at + len(wanted) // 2] ^= 1
    (model_dir / "openvino_model.bin").write_bytes(content)
    message = error_of("weights-differ", verify.weights_equal, reference, model_dir / "openvino_model.xml")
    assert message == f"the IR's {name} differs from the checkpoint's; the conversion is wrong"


def test_matrix_that_is_not_in_the_ir_is_named(model_dir: Path, reference: Any) -> None:
    path = model_dir / "openvino_model.xml"
    path.write_text(path.read_text().replace('name="self.lm_head.weight"', 'name="something_else"'))
    message = error_of("weights-missing", verify.weights_equal, reference, path)
    assert message == "1 weight matrices were not found in the IR, the first is lm_head.weight"


def test_logits_of_a_right_export_agree_beyond_the_yarn_original_length(tiny_fp32: Path, reference: Any) -> None:
    tokens = verify.proof_length(reference.config)
    assert tokens == 192 > tiny.ARCEE["rope_parameters"]["original_max_position_embeddings"]
    ids = verify.prompt(reference.config, tokens)
    assert len(set(ids)) > 50
    found = verify.logits_equal(reference, tiny_fp32 / "openvino_model.xml", ids)
    assert found["top1_agreement"] == 1.0
    assert 0 < found["max_logit_diff"] < 1e-3 < found["max_logit"]


@pytest.mark.parametrize(
    "rope",
    [{"factor": 4.0}, {"rope_theta": 500000.0}, {"rope_type": "default"}],
    ids=lambda rope: next(iter(rope)),
)
def test_wrong_rope_is_found(tiny_fp32: Path, tiny_checkpoint: Path, tmp_path: Path, rope: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    tiny.edit_json(copy / "config.json", rope_parameters={**tiny.ARCEE["rope_parameters"], **rope})
    other = AutoModelForCausalLM.from_pretrained(copy, dtype="float32").eval()
    message = error_of(
        "logits-differ", verify.logits_equal, other, tiny_fp32 / "openvino_model.xml", verify.prompt(other.config, 192)
    )
    assert message.startswith("the exported model is not its source: logits differ by up to ")
    assert message.endswith(" of 192 tokens")


def test_logits_that_are_not_finite_are_found(model_dir: Path, reference: Any) -> None:
    wanted = reference.state_dict()["lm_head.weight"].numpy()
    content = (model_dir / "openvino_model.bin").read_bytes()
    (model_dir / "openvino_model.bin").write_bytes(
        content.replace(wanted.tobytes(), np.full_like(wanted, np.nan).tobytes())
    )
    message = error_of(
        "logits-not-finite",
        verify.logits_equal,
        reference,
        model_dir / "openvino_model.xml",
        verify.prompt(reference.config, 192),
    )
    assert message == "the exported model gives logits that are not finite"


def job(checkpoint: Path, work: Path, proof_bytes: int) -> convert.Job:
    return convert.Job(checkpoint, work, work, RECIPES["fp32"], proof_bytes=proof_bytes)


@pytest.mark.slow
def test_proof_of_a_slice_says_what_it_left_out(
    tiny_checkpoint: Path, tiny_fp32: Path, tmp_path: Path, reference: Any
) -> None:
    one, two = (verify.proof_memory(reference.config, 192, num_hidden_layers=layers) for layers in (1, 2))
    assert one < two
    shutil.copyfile(tiny_fp32 / "openvino_model.xml", tmp_path / "openvino_model.xml")
    shutil.copyfile(tiny_fp32 / "openvino_model.bin", tmp_path / "openvino_model.bin")
    found = convert.prove(reference, job(tiny_checkpoint, tmp_path, int(one + 1)))
    assert found["layers"] == 1
    assert found["skipped"] == "memory: num_hidden_layers 1 of 2"
    assert found["top1_agreement"] == 1.0
    assert found["tokens"] == 192
    assert sorted(path.name for path in tmp_path.iterdir()) == ["openvino_model.bin", "openvino_model.xml"]


def test_proof_without_memory_says_how_much_it_needs(tiny_checkpoint: Path, tmp_path: Path, reference: Any) -> None:
    found = convert.prove(reference, job(tiny_checkpoint, tmp_path, 10**8))
    assert found == {"skipped": "one layer needs 1.0 GB of memory, 0.1 GB are free"}


def test_cost_of_nothing_is_nothing_and_of_damage_is_much(
    model_dir: Path, tiny_fp32: Path, tmp_path: Path, reference: Any
) -> None:
    ids = verify.prompt(reference.config, 100)
    verify.save_reference(reference, ids, tmp_path / "reference.npz")
    same = verify.compression_cost(tiny_fp32 / "openvino_model.xml", tmp_path / "reference.npz")
    assert same["tokens"] == 100
    assert abs(same["kl_mean"]) < 1e-6
    assert same["top1_agreement"] == 1.0
    weight = reference.state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    content = (model_dir / "openvino_model.bin").read_bytes()
    (model_dir / "openvino_model.bin").write_bytes(content.replace(weight.tobytes(), (weight * 1.5).tobytes()))
    damaged = verify.compression_cost(model_dir / "openvino_model.xml", tmp_path / "reference.npz")
    assert damaged["kl_mean"] > 0.01
    assert damaged["kl_max"] >= damaged["kl_mean"]
    assert damaged["top1_agreement"] < 1.0


def test_source_without_a_template_has_nothing_to_compare(
    tiny_checkpoint: Path, model_dir: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    message = error_of("chat-template-differs", verify.tokenizer_equal, copy, model_dir)
    assert message == "the exported model has a chat template, and the source has none"
    checks = verify.tokenizer_equal(copy, converted(copy, tmp_path / "without"))
    assert checks["chat_template"] == {"skipped": "the source has no chat template"}


def converted(checkpoint: Path, folder: Path) -> Path:
    """The tokenizer of a checkpoint as a model directory has it."""
    folder.mkdir()
    convert.write_tokenizer(checkpoint, folder)
    return folder


def with_template(tiny_checkpoint: Path, folder: Path, text: str) -> Path:
    """A copy of the checkpoint's tokenizer with another chat template."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(tiny_checkpoint / name, folder / name)
    (folder / "chat_template.jinja").write_text(text)
    return folder


def test_a_template_that_renders_nothing_fails_with_its_reason(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = with_template(tiny_checkpoint, tmp_path / "source", "{{ raise_exception('never') }}")
    message = error_of("chat-template-unusable", verify.tokenizer_equal, source, converted(source, tmp_path / "model"))
    assert "(a question: never)" in message


def test_what_genai_cannot_render_is_recorded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = with_template(tiny_checkpoint, tmp_path / "source", templates.ASCII)
    check = verify.tokenizer_equal(source, converted(source, tmp_path / "model"))["chat_template"]
    assert check["equal"]
    assert list(check["genai_differs"]) == [each.name for each in CONVERSATIONS if each.tools]
    assert "Unknown argument ensure_ascii" in check["genai_differs"]["a tool call"]


def test_a_template_that_writes_the_time_is_compared(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = with_template(tiny_checkpoint, tmp_path / "source", templates.DATED)
    assert verify.tokenizer_equal(source, converted(source, tmp_path / "model"))["chat_template"]["equal"]


def test_a_template_in_the_tokenizer_s_ir_alone_is_compared(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As in a model that another program exported, and that is taken as it is."""
    folder = converted(tiny_checkpoint, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    check = verify.tokenizer_equal(folder, folder)["chat_template"]
    assert (check["equal"], check["conversations"]) == (True, 2 * len(CONVERSATIONS))
