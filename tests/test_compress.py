"""Compression does what the recipe says, or says what it did instead."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from ov_afm.compress import (
    add_recipe_arguments,
    compress,
    compress_ir,
    main,
    recipe_from_arguments,
    resolve_recipe,
)
from ov_afm.conversion import convert
from ov_afm.errors import CompressionError, ConfigError, DeviceError, OVAFMError
from ov_afm.model_dir import manifest
from ov_afm.presets import RECIPES, Recipe
from ov_afm.quantization import calibration
from ov_afm.system import child_process

CHAT = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}]


def quantize(model: Path, out: Path, **recipe: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return compress_ir(model / "openvino_model.xml", out, Recipe(**{"weight_format": "int4", **recipe}), model)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(target: str, *_: Any, **__: Any) -> None:
        pytest.fail(f"{target} was started")

    monkeypatch.setattr(child_process, "run", run)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(calibration.PACKAGED_TEXT.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    return path


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    # Texts that differ: what is there twice counts once.
    text = calibration.PACKAGED_TEXT.read_text(encoding="utf-8")
    lines = [json.dumps({"messages": CHAT}), ""]
    lines += [json.dumps({"text": text[begin : begin + 2000]}) for begin in range(0, 8000, 2000)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# -- Formats and notes


@pytest.mark.parametrize(
    ("recipe", "layers"),
    [
        ({"weight_format": "int8", "sym": True}, {"int8_sym per row": 14}),
        ({"group_size": 64, "all_layers": True}, {"int4_asym g64": 14}),
        ({"sym": True, "backup_precision": "int8_sym"}, {"int8_sym per row": 2, "int4_sym per row": 12}),
        ({"group_size": 32, "backup_precision": "none"}, {"f32": 2, "int4_asym g32": 12}),
    ],
    ids=["int8-sym", "all-layers", "npu", "no-backup"],
)
def test_layers_take_the_formats_of_the_recipe(
    tiny_fp32: Path, tmp_path: Path, recipe: dict[str, Any], layers: dict[str, int]
) -> None:
    assert quantize(tiny_fp32, tmp_path / "out", **recipe) == {"layers": layers, "notes": []}


# Of two layers, in bits; attention is q, k, v and o.
TABLES_8 = {"embedding": 8, "head": 8}
KINDS = [
    ({"head": "int4"}, {"embedding": 8}),
    ({"embedding": "int4"}, {"head": 8}),
    ({"attention": "int8"}, {**TABLES_8, "attention": 8}),
    ({"down": "int8"}, {**TABLES_8, "down": 8}),
    ({"embedding": "int4", "up": "int8"}, {"head": 8, "up": 8}),
    (dict.fromkeys(("embedding", "head", "attention", "up", "down"), "int4"), {}),
]


def bits_of_kinds(folder: Path) -> dict[str, int]:
    """Bits of each kind of matrices in a compressed IR; a kind of several is an error."""
    import openvino

    found: dict[str, set[int]] = {}
    for node in openvino.Core().read_model(folder / "openvino_model.xml").get_ops():
        match = re.search(
            r"(embed_tokens|lm_head|self_attn|up|down)(_proj|\.[qkvo]_proj)?\.weight$", node.get_friendly_name()
        )
        if node.get_type_name() == "Constant" and match:
            kind = {"embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention"}.get(match[1], match[1])
            found.setdefault(kind, set()).add(int(node.get_element_type().get_type_name()[1:]))
    assert all(len(bits) == 1 for bits in found.values()), found
    return {kind: bits.pop() for kind, bits in found.items()}


def formats(kinds: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(kinds.items())


@pytest.mark.parametrize(("kinds", "eight"), KINDS, ids=["-".join(kinds) for kinds, _ in KINDS])
def test_kinds_take_their_own_formats(
    tiny_fp32: Path, tmp_path: Path, kinds: dict[str, str], eight: dict[str, int]
) -> None:
    found = quantize(tiny_fp32, tmp_path / "out", group_size=32, sym=True, kinds=formats(kinds))
    assert found["notes"] == []
    assert set(found["layers"]) <= {"int4_sym g32", "int8_asym per row"}
    every = dict.fromkeys(("embedding", "head", "attention", "up", "down"), 4)
    assert bits_of_kinds(tmp_path / "out") == {**every, **eight}


@pytest.mark.parametrize(
    "algorithm",
    [
        {"scale_estimation": True},
        {"gptq": True},
        {"equalise": "full"},
        {"rounding": "fitted"},
        {"equalise": "full", "rounding": "fitted"},
    ],
    ids=["scale-estimation", "gptq", "equalise", "fitted", "quality"],
)
def test_every_rounding_keeps_the_formats_of_kinds(
    tiny_fp32: Path, tmp_path: Path, text: Path, algorithm: dict[str, Any]
) -> None:
    kinds = formats({"head": "int4", "attention": "int8"})
    options = {"group_size": 32, "kinds": kinds, "backup_precision": "int8_sym"}
    plain = quantize(tiny_fp32, tmp_path / "plain", **options)
    found = quantize(tiny_fp32, tmp_path / "out", **options, **algorithm, dataset=str(text), num_samples=3)
    assert found["layers"] == plain["layers"] == {"int8_sym per row": 9, "int4_asym g32": 5}
    assert bits_of_kinds(tmp_path / "out") == {"embedding": 8, "head": 4, "attention": 8, "up": 4, "down": 4}
    weights = [(tmp_path / name / "openvino_model.bin").read_bytes() for name in ("plain", "out")]
    assert weights[0] != weights[1]


def test_ratio_chooses_among_kinds_without_a_format(tiny_fp32: Path, tmp_path: Path) -> None:
    kinds = formats({"head": "int4", "up": "int4", "down": "int4"})
    assert quantize(tiny_fp32, tmp_path / "out", group_size=32, ratio=0.0, kinds=kinds)["layers"] == {
        "int8_asym per row": 9,
        "int4_asym g32": 5,
    }
    assert bits_of_kinds(tmp_path / "out") == {"embedding": 8, "head": 4, "attention": 8, "up": 4, "down": 4}


def test_table_that_takes_four_bits_leaves_the_other_as_it_is_without_backup(tiny_fp32: Path, tmp_path: Path) -> None:
    kinds = formats({"head": "int4"})
    found = quantize(tiny_fp32, tmp_path / "out", group_size=32, backup_precision="none", kinds=kinds)
    assert found == {"layers": {"f32": 1, "int4_asym g32": 13}, "notes": []}


def test_kind_that_the_model_lacks_is_refused(tiny_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressionError) as caught:
        quantize(tiny_fp32, tmp_path / "out", kinds=formats({"gate": "int8"}))
    expected = "the model has no matrices of kind gate; it has attention, down, embedding, head, up"
    assert str(caught.value) == expected


def test_tied_embedding_has_one_format(tmp_path: Path) -> None:
    checkpoint, model = tmp_path / "checkpoint", tmp_path / "model"
    tiny.write_arcee(checkpoint, tie_word_embeddings=True)
    for folder in (model, tmp_path / "work"):
        folder.mkdir()
    fp32 = RECIPES["fp32"].to_dict()
    convert.build(
        str(checkpoint), str(model), str(tmp_path / "work"), recipe=fp32, proof_bytes=0, prove=False,
        trust_remote_code=False,
    )  # fmt: skip
    with pytest.raises(CompressionError) as caught:
        quantize(model, tmp_path / "out", group_size=32, kinds=formats({"head": "int4"}))
    assert str(caught.value) == (
        "embedding and head are one matrix in this model, found head=int4; "
        "give both the same: --kind embedding=int4,head=int4"
    )
    kinds = formats({"head": "int4", "embedding": "int4", "down": "int8"})
    found = quantize(model, tmp_path / "out", group_size=32, kinds=kinds)
    assert found == {"layers": {"int4_asym g32": 11, "int8_asym per row": 2}, "notes": []}
    assert bits_of_kinds(tmp_path / "out") == {"embedding": 4, "attention": 4, "up": 4, "down": 8}


def test_ratio_leaves_layers_in_backup_precision(tiny_fp32: Path, tmp_path: Path) -> None:
    layers = quantize(tiny_fp32, tmp_path / "out", group_size=32, ratio=0.5)["layers"]
    assert layers["int8_asym per row"] > 2
    assert layers["int4_asym g32"] > 0
    assert sum(layers.values()) == 14


def test_ratio_zero_leaves_all_layers_in_backup_precision(tiny_fp32: Path, tmp_path: Path) -> None:
    assert quantize(tiny_fp32, tmp_path / "out", group_size=32, ratio=0.0)["layers"] == {"int8_asym per row": 14}


def test_group_size_that_does_not_divide_is_adjusted_and_told(tiny_fp32: Path, tmp_path: Path) -> None:
    found = quantize(tiny_fp32, tmp_path / "out", group_size=128, sym=True)
    assert found["layers"] == {"int8_asym per row": 2, "int4_sym g64": 10, "int4_sym g128": 2}
    assert found["notes"] == ["group size 128 does not divide every layer's input dimension: 10 of int4_sym g64"]


def test_group_size_that_does_not_divide_is_refused_on_demand(tiny_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressionError) as caught:
        quantize(tiny_fp32, tmp_path / "out", group_size=128, group_size_fallback="error")
    message = str(caught.value)
    assert message.startswith("NNCF cannot apply recipe custom: ")
    assert "128" in message
    assert "\n" not in message
    assert list((tmp_path / "out").iterdir()) == []


def test_group_size_that_does_not_divide_leaves_layers_uncompressed_and_told(tiny_fp32: Path, tmp_path: Path) -> None:
    found = quantize(tiny_fp32, tmp_path / "out", group_size=128, group_size_fallback="ignore")
    assert found["layers"] == {"int8_asym per row": 2, "int4_asym g128": 2, "f32": 10}
    assert found["notes"] == ["group size 128 does not divide every layer's input dimension: 10 of f32"]


def test_awq_without_effect_is_told(tiny_fp32: Path, tmp_path: Path, text: Path) -> None:
    found = quantize(tiny_fp32, tmp_path / "out", group_size=64, awq=True, dataset=str(text), num_samples=2)
    assert found["notes"] == [
        "AWQ did nothing: NNCF knows no pattern that fits this model's MLP; the weights are plain int4"
    ]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_scale_estimation_changes_scales_and_records_its_data(
    tiny_fp32: Path, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    data: Path = request.getfixturevalue(kind)
    plain = quantize(tiny_fp32, tmp_path / "plain", group_size=64)
    fitted = quantize(
        tiny_fp32, tmp_path / "out", group_size=64, scale_estimation=True, dataset=str(data), num_samples=3
    )
    assert fitted["layers"] == plain["layers"]
    assert fitted["calibration"]["name"] == data.name
    assert fitted["calibration"]["sha256"] == manifest.sha256(data)
    assert fitted["calibration"]["samples"] == 3
    assert fitted["calibration"]["tokens"] >= calibration.MINIMUM_TOKENS
    weights = [(tmp_path / name / "openvino_model.bin").read_bytes() for name in ("plain", "out")]
    assert weights[0] != weights[1]


def test_compressed_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressionError) as caught:
        quantize(tiny_model, tmp_path / "out", group_size=64)
    message = str(caught.value)
    assert message.startswith("the weights are compressed already (")
    assert message.endswith("); start from an fp16 or fp32 export")


def test_progress_of_nncf_reaches_the_parent(tiny_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []

    class Channel:
        write = staticmethod(lines.append)
        flush = staticmethod(lambda: None)

    monkeypatch.setattr(child_process, "_channel", Channel())
    quantize(tiny_fp32, tmp_path / "out", group_size=64)
    events = [json.loads(line) for line in lines]
    assert events
    assert {event["event"] for event in events} == {"progress"}
    assert 0 < events[-1]["done"] <= events[-1]["total"]


# -- The verb


@pytest.mark.slow
def test_command_makes_a_whole_model_directory(
    tiny_fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import openvino_genai

    out = tmp_path / "int4"
    flags = ["--weight-format", "int4", "--sym", "--group-size", "64"]
    assert main([str(tiny_fp32), "-o", str(out), *flags]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1].startswith(f"{out}  custom  ")
    assert "library messages: " in captured.err
    found = manifest.verify(out, hashes=True)
    assert found is not None
    assert found.source == {"kind": "openvino", "id": "tiny-fp32"}
    assert found.recipe["layers"] == {"int8_asym per row": 2, "int4_sym g64": 12}
    assert 0 < found.checks["compression"]["kl_mean"] < 2
    answer = openvino_genai.LLMPipeline(out, "CPU").generate("def", max_new_tokens=3, ignore_eos=True)
    assert isinstance(answer, str)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["int4"]


def error_of(*arguments: Any, **options: Any) -> str:
    with pytest.raises(OVAFMError) as caught:
        compress(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize("recipe", ["fp16", "fp32"])
def test_formats_that_do_not_compress_are_refused(tiny_fp32: Path, tmp_path: Path, no_work: None, recipe: str) -> None:
    assert error_of(tiny_fp32, tmp_path / "out", recipe=recipe) == (
        f"compress makes int8 and int4 models, found {recipe}; export the model in that format"
    )


def test_device_that_cannot_run_the_recipe_is_refused_before_any_work(
    tiny_fp32: Path, tmp_path: Path, no_work: None
) -> None:
    with pytest.raises(DeviceError, match="NPU"):
        compress(tiny_fp32, tmp_path / "out", recipe=Recipe(weight_format="int4", group_size=64), device="NPU")
    with pytest.raises(DeviceError, match="NPU"):
        compress(tiny_fp32, tmp_path / "out", recipe=Recipe(weight_format="int4", sym=True, ratio=0.8), device="NPU")
    mixed = replace(RECIPES["int4-npu"], kinds=(("down", "int8"),))
    with pytest.raises(DeviceError, match="down=int8.*: it needs ratio 1.0"):
        compress(tiny_fp32, tmp_path / "out", recipe=mixed, device="NPU")
    assert list(tmp_path.iterdir()) == []


def test_recipe_that_needs_data_and_was_given_none_takes_the_packaged_text() -> None:
    assert resolve_recipe("int4-quality").dataset == calibration.PACKAGED
    assert resolve_recipe("int4").dataset is None
    assert resolve_recipe(Recipe(equalise="fp16")).dataset == calibration.PACKAGED


def test_equalisation_is_done_before_rounding_and_recorded(tiny_fp32: Path, tmp_path: Path, text: Path) -> None:
    data = {"dataset": str(text), "num_samples": 2, "group_size": 64}
    plain = quantize(tiny_fp32, tmp_path / "plain", **data)
    found = quantize(tiny_fp32, tmp_path / "out", equalise="full", **data)
    assert found["layers"] == plain["layers"]
    assert "calibration" not in plain
    assert found["calibration"]["samples"] == 2
    assert found["equalisation"]["layers"] == 2
    assert set(found["equalisation"]["error_ratio"]) == {"qkv", "o", "up", "down"}
    weights = [(tmp_path / name / "openvino_model.bin").read_bytes() for name in ("plain", "out")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"equalise": "some"}, "equalisation 'some' is unknown; choose one of none, fp16, full"),
        (
            {"weight_format": "fp16", "equalise": "full"},
            "equalisation 'full' prepares for int8 and int4, found fp16; choose fp16 or none",
        ),
    ],
)
def test_equalisation_that_makes_no_sense_is_refused(recipe: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe(**recipe)
    assert str(caught.value) == message


def test_checkpoint_in_place_of_a_model_gets_the_export_command(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert error_of(tiny_checkpoint, tmp_path / "out") == (
        f"{tiny_checkpoint} is a checkpoint, not an OpenVINO model; run: ov-afm export {tiny_checkpoint} --output DIR"
    )


# -- Flags


def recipe_of(*flags: str) -> Recipe | None:
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser)
    return recipe_from_arguments(parser.parse_args(flags))


def test_no_flags_ask_for_no_recipe() -> None:
    assert recipe_of() is None
    assert recipe_of("--device", "NPU") is None


@pytest.mark.parametrize("name", list(RECIPES))
def test_named_recipe_is_that_recipe(name: str) -> None:
    assert recipe_of("--recipe", name) is RECIPES[name]


def test_weight_format_alone_is_the_recipe_of_that_name() -> None:
    assert recipe_of("--weight-format", "int4") is RECIPES["int4"]


def test_flags_override_parts_and_make_the_recipe_custom() -> None:
    flags = ["--group-size", "32", "--ratio", "0", "--no-sym", "--all-layers", "--backup-precision", "none"]
    assert recipe_of("--recipe", "int4", *flags) == Recipe(
        name="custom",
        weight_format="int4",
        sym=False,
        group_size=32,
        ratio=0.0,
        all_layers=True,
        backup_precision="none",
    )


def test_formats_of_kinds_are_one_flag() -> None:
    found = recipe_of("--recipe", "int4", "--kind", "attention=int8, head=int4")
    assert found == Recipe(
        weight_format="int4", sym=True, group_size=128, kinds=(("head", "int4"), ("attention", "int8"))
    )
    with pytest.raises(ConfigError, match="^format '' of kind head is unknown; choose one of int4, int8$"):
        recipe_of("--recipe", "int4", "--kind", "head")


def test_data_does_not_change_the_name_of_a_recipe() -> None:
    found = recipe_of("--recipe", "int4-quality", "--dataset", "my.txt", "--num-samples", "7")
    assert found is not None
    assert (found.name, found.dataset, found.num_samples) == ("int4-quality", "my.txt", 7)


def test_every_algorithm_flag_arrives() -> None:
    found = recipe_of("--weight-format", "int4", "--awq", "--scale-estimation", "--gptq", "--dataset", "x.txt")
    assert found is not None
    assert found.awq
    assert found.scale_estimation
    assert found.gptq


def test_flags_that_contradict_are_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "-o", str(tmp_path / "out"), "--recipe", "int8", "--group-size", "64"]) == 1
    assert capsys.readouterr().err == ("ov-afm: error: --group-size only applies to int4, found weight format int8\n")


def test_int4_with_named_weight_format_of_another_recipe_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="only applies to int4"):
        recipe_of("--recipe", "int4", "--weight-format", "int8")
