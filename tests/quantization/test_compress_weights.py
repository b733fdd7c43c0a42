"""Compressed weights have the formats of the recipe, or the notes say what was done instead."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import tiny

from ov_afm.conversion import convert
from ov_afm.errors import CompressionError
from ov_afm.model_dir import manifest
from ov_afm.presets import RECIPES, Recipe
from ov_afm.quantization import calibration
from ov_afm.quantization.compress_weights import compress_ir
from ov_afm.system.child_process import ChildProcess, Progress

CHAT = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}]


def quantize(model: Path, out: Path, **recipe: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return compress_ir(model / "openvino_model.xml", out, Recipe(**{"weight_format": "int4", **recipe}), model)


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


@pytest.mark.slow
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
    assert caught.value.code == "kind-missing"
    assert str(caught.value) == "the model has no matrices of kind gate; it has attention, down, embedding, head, up"


@pytest.mark.slow
def test_tied_embedding_has_one_format(tmp_path: Path) -> None:
    checkpoint, model = tmp_path / "checkpoint", tmp_path / "model"
    tiny.write_arcee(checkpoint, tie_word_embeddings=True)
    for folder in (model, tmp_path / "work"):
        folder.mkdir()
    convert.build(convert.Job(checkpoint, model, tmp_path / "work", RECIPES["fp32"], prove=False))
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
    assert caught.value.code == "recipe-refused"
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
    assert caught.value.code == "compressed-already"
    assert "int8_asym per row" in str(caught.value)


@pytest.mark.slow
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


@pytest.mark.slow
def test_progress_of_every_step_reaches_the_parent_from_its_beginning_to_its_end(
    tiny_fp32: Path, tmp_path: Path, text: Path
) -> None:
    events: list[Progress] = []
    recipe = Recipe(
        weight_format="int4", group_size=64, equalise="full", rounding="fitted", dataset=str(text), num_samples=2
    )
    ChildProcess(on_event=events.append).run(compress_ir, tiny_fp32 / "openvino_model.xml", tmp_path, recipe, tiny_fp32)
    for name in ("equalising", "rounding"):
        assert [(each.done, each.total) for each in events if each.name == name] == [(1, 2), (2, 2)]
    nncf = [each for each in events if each.name not in ("equalising", "rounding")]
    for name in {each.name for each in nncf}:
        steps = [each for each in nncf if each.name == name]
        assert steps[0].done == 0
        assert steps[-1].done == steps[-1].total > 0
    assert nncf
