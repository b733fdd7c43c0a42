"""Fitted rounding: nearer than nearest, in the formats that NNCF chose, and stored as the engine reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import pytest
import torch
from support.exact import EXACT

from ov_afm.errors import CompressionError
from ov_afm.model_dir.inference import decoder_inputs, input_names
from ov_afm.presets import RECIPES
from ov_afm.quantization.compress_weights import compress_ir
from ov_afm.quantization.decoder_weights import Decoder
from ov_afm.quantization.quantized_constants import find_quantized
from ov_afm.quantization.quantizer import Quantizer
from ov_afm.quantization.reconstruction import fit

FORMATS = [Quantizer(4, True, 32), Quantizer(4, False, 32), Quantizer(4, True), Quantizer(8, False)]
NAMES = ["int4-g32", "int4-asym-g32", "int4-rows", "int8-asym"]


def compressed(folder: Path, quantizer: Quantizer) -> tuple[Any, Any]:
    """An uncompressed IR, and what NNCF makes of it."""
    core = openvino.Core()
    original, model = (core.read_model(folder / "openvino_model.xml") for _ in range(2))
    mode = nncf.CompressWeightsMode[f"INT{quantizer.bits}_{'SYM' if quantizer.sym else 'ASYM'}"]
    return original, nncf.compress_weights(
        model, mode=mode, **({"group_size": quantizer.group_size} if quantizer.bits == 4 else {})
    )


def logits(model: Any, ids: list[int]) -> Any:
    request = openvino.Core().compile_model(model, "CPU", EXACT).create_infer_request()
    request.infer(decoder_inputs(ids, input_names(model)))
    return torch.from_numpy(request.get_tensor("logits").data[0].copy()).log_softmax(-1)


def texts(count: int, length: int = 96, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    # Some tokens far more often than others, as in a language.
    return [(3 + random.zipf(1.3, length) % 500).tolist() for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", FORMATS, ids=NAMES)
def test_fitted_model_is_nearer_and_keeps_its_formats(tiny_fp32: Path, tmp_path: Path, quantizer: Quantizer) -> None:
    original, model = compressed(tiny_fp32, quantizer)
    ids = texts(1, seed=9)[0]
    expected = logits(original, ids)

    def kl(found: Any) -> float:
        return float((expected.exp() * (expected - found)).sum(-1).mean())

    nearest = kl(logits(model, ids))
    formats = {name: each.quantizer for name, each in find_quantized(model).items()}
    assert fit(Decoder.of(original, tiny_fp32), model, texts(24)) == 12
    assert kl(logits(model, ids)) < 0.7 * nearest
    # What is written is what is read again.
    openvino.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
    again = openvino.Core().read_model(tmp_path / "model.xml")
    assert {name: each.quantizer for name, each in find_quantized(again).items()} == formats
    assert kl(logits(again, ids)) == pytest.approx(kl(logits(model, ids)), rel=1e-3)


@pytest.mark.parametrize("quantizer", FORMATS, ids=NAMES)
def test_stored_values_are_what_the_engine_multiplies_with(tiny_fp32: Path, quantizer: Quantizer) -> None:
    original, model = compressed(tiny_fp32, quantizer)
    matrices = find_quantized(model)
    plain = {node.get_friendly_name(): node for node in original.get_ops() if node.get_friendly_name() in matrices}
    assert len(plain) == len(matrices) >= 13
    for name, matrix in matrices.items():
        before = matrix.value()
        size = matrix.quantizer.group_of(before.shape[1])
        weight = torch.from_numpy(np.array(plain[name].data, dtype=np.float32)).view(len(before), -1, size)
        # NNCF divides in fp32 and stores the scale in fp16, so that a code may differ by one.
        step = np.abs(before).max() * 2 / (1 << matrix.quantizer.bits)
        assert np.abs(before - matrix.quantizer.round_trip(weight).view(before.shape).numpy()).max() < 1.2 * step


@pytest.mark.slow
def test_recipe_rescales_rounds_and_records_it(tiny_fp32: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text(
        "\n\n".join(f"Paragraph {number} tells of {number**2} boats and of their sails." for number in range(99))
    )
    recipe = replace(RECIPES["int4-quality"], group_size=32, dataset=str(text), num_samples=4)
    found = compress_ir(tiny_fp32 / "openvino_model.xml", tmp_path, recipe, tiny_fp32)
    assert found["fitted_matrices"] == 12
    assert found["equalisation"]["layers"] == 2
    assert found["calibration"]["samples"] == 4
    assert found["layers"]["int4_sym g32"] == 12


@pytest.mark.slow
def test_what_nncf_leaves_as_it_is_gets_its_scales_too(tiny_fp32: Path, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("\n\n".join(f"Paragraph {number} tells of {number**2} boats." for number in range(200)))
    changes: dict[str, Any] = {"group_size": 128, "group_size_fallback": "ignore", "backup_precision": "none"}
    recipe = replace(RECIPES["int4-quality"], dataset=str(text), num_samples=4, **changes)
    found = compress_ir(tiny_fp32 / "openvino_model.xml", tmp_path, recipe, tiny_fp32)
    # Only down_proj has rows of 128.
    assert found["fitted_matrices"] == 2
    core, ids = openvino.Core(), texts(1, seed=9)[0]
    expected, made = (logits(core.read_model(each / "openvino_model.xml"), ids) for each in (tiny_fp32, tmp_path))
    # Without its scales one matrix alone makes it 0.29.
    assert float((expected.exp() * (expected - made)).sum(-1).mean()) < 0.06


def test_layer_that_transformers_does_not_know_is_refused(tiny_fp32: Path, tmp_path: Path) -> None:
    original, model = compressed(tiny_fp32, FORMATS[0])
    config = (tiny_fp32 / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"attention_bias": false', '"attention_bias": true'))
    with pytest.raises(CompressionError, match="^layer 0 is not the layer of ArceeDecoderLayer: ") as caught:
        fit(Decoder.of(original, tmp_path), model, texts(2))
    assert caught.value.code == "layer-unknown"
