"""Rescaling leaves the function as it was, makes rounding cheaper, and keeps squares within fp16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from support.exact import EXACT

from ov_afm.errors import CompressionError
from ov_afm.model_dir.inference import decoder_inputs, input_names
from ov_afm.quantization.decoder_layer import DecoderLayer, streams
from ov_afm.quantization.decoder_weights import Decoder, constant_as_f32, find_layers
from ov_afm.quantization.equalization import FP16_LIMIT, FP16_PEAK, Equalised, equalise
from ov_afm.quantization.quantizer import Quantizer

INT4 = Quantizer(4, True, 64)


@pytest.fixture
def model(tiny_fp32: Path) -> Any:
    return openvino.Core().read_model(tiny_fp32 / "openvino_model.xml")


def texts(count: int = 3, length: int = 96) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(3, 512, length).tolist() for _ in range(count)]


def rescaled(model: Any, quantizer: Quantizer | None, folder: Path) -> Equalised:
    decoder = Decoder.of(model, folder)
    result = equalise(decoder, texts(), quantizer)
    for layer in decoder.layers:
        layer.write()
    return result


def overflow(model: Any, folder: Path) -> int:
    """Values that are not finite when every ReLU² MLP of an uncompressed IR runs in fp16 on its real inputs."""
    decoder = Decoder.of(model, folder)
    module, stream = DecoderLayer(folder), streams(texts(), constant_as_f32(decoder.embedding))
    lost = 0
    with torch.inference_mode(), np.errstate(over="ignore", invalid="ignore"):
        for layer in decoder.layers:
            module.load(layer)
            inner = module.layer
            stream = [x + inner.self_attn.o_proj(module.attend(inner.input_layernorm(x))) for x in stream]
            for at, x in enumerate(stream):
                normed = inner.post_attention_layernorm(x)
                # Products of fp16 values, summed in f32 and stored in fp16, as GPUs do.
                weights = [matrix.value.astype(np.float16).astype(np.float32).T for matrix in (layer.up, layer.down)]
                up = (normed.half().float().numpy() @ weights[0]).astype(np.float16)
                hidden = np.square(np.maximum(up, np.float16(0)))
                out = (hidden.astype(np.float32) @ weights[1]).astype(np.float16)
                lost += int((~np.isfinite(hidden)).sum()) + int((~np.isfinite(out)).sum())
                stream[at] = x + inner.mlp(normed)
    return lost


def logits(model: Any) -> Any:
    request = openvino.Core().compile_model(model, "CPU", EXACT).create_infer_request()
    request.infer(decoder_inputs(texts()[0], input_names(model)))
    return request.get_tensor("logits").data.copy()


def loud(model: Any, factor: float = 256.0) -> Any:
    """Every third neuron louder than fp16 can square, and its column of down_proj quieter: the same function."""
    for layer in find_layers(model):
        scales = np.ones(layer.up.value.shape[0], dtype=np.float32)
        scales[::3] = factor
        layer.up.scale_rows(scales)
        layer.down.scale_columns(1 / scales**2)
        layer.write()
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "quantizer",
    [INT4, Quantizer(4, False, 32), Quantizer(4, True), Quantizer(8, False), None],
    ids=["int4-g64", "int4-asym-g32", "int4-rows", "int8", "fp16-guard"],
)
def test_logits_stay_what_they_were(model: Any, tiny_fp32: Path, quantizer: Quantizer | None) -> None:
    before = logits(model)
    found = rescaled(model, quantizer, tiny_fp32)
    assert np.abs(logits(model) - before).max() <= 1e-4 * np.abs(before).max()
    assert found.layers == 2
    assert set(found.error) == (set() if quantizer is None else {"qkv", "o", "up", "down"})
    assert all(ratio <= 1 for ratio in found.error.values())


def test_kinds_are_rescaled_for_their_own_rounding(model: Any, tiny_fp32: Path) -> None:
    decoder, again = Decoder.of(model, tiny_fp32), Decoder.of(model, tiny_fp32)
    found = equalise(decoder, texts(), INT4, kinds={"attention": Quantizer(8, False)})
    plain = equalise(again, texts(), INT4)
    mixed = [(layer.q.value, layer.down.value) for layer in decoder.layers]
    for (q, down), layer in zip(mixed, again.layers, strict=True):
        assert not np.array_equal(q, layer.q.value)
        assert np.array_equal(down, layer.down.value)
    assert found.error["qkv"] != plain.error["qkv"]
    assert found.error["down"] == plain.error["down"]


def test_any_positive_scales_of_neurons_leave_the_function(model: Any) -> None:
    before = logits(model)
    random = np.random.default_rng(7)
    for layer in find_layers(model):
        scales = np.exp(random.normal(0, 2, layer.up.value.shape[0])).astype(np.float32)
        layer.up.scale_rows(scales)
        layer.down.scale_columns(1 / scales**2)
        layer.write()
    assert np.abs(logits(model) - before).max() <= 1e-4 * np.abs(before).max()


def test_guard_keeps_squares_within_fp16_and_changes_nothing_else(model: Any, tiny_fp32: Path) -> None:
    assert overflow(loud(model), tiny_fp32) > 0
    before = logits(model)
    found = rescaled(model, None, tiny_fp32)
    assert found.peak_up > FP16_LIMIT
    assert found.guarded > 0
    assert overflow(model, tiny_fp32) == 0
    # Powers of two: not one bit of the result moves.
    assert np.array_equal(logits(model), before)
    again = rescaled(model, None, tiny_fp32)
    assert again.peak_up <= FP16_PEAK
    assert again.guarded == 0


def test_full_equalisation_keeps_the_guard(model: Any, tiny_fp32: Path) -> None:
    rescaled(loud(model), INT4, tiny_fp32)
    assert overflow(model, tiny_fp32) == 0


def test_quiet_model_is_not_guarded(model: Any, tiny_fp32: Path) -> None:
    found = rescaled(model, None, tiny_fp32)
    assert found.guarded == 0
    assert found.recorded()["fp16_guarded_neurons"] == 0


def test_constant_that_two_layers_share_changes_only_where_it_is_asked_to(model: Any) -> None:
    first, second = find_layers(model)
    kept = second.mlp_norm.value.copy()
    first.mlp_norm.scale_columns(np.full(kept.size, 2.0, dtype=np.float32))
    first.write()
    assert np.array_equal(find_layers(model)[1].mlp_norm.value, kept)


def test_weight_that_is_not_finite_is_named(model: Any, tiny_fp32: Path) -> None:
    layer = find_layers(model)[1]
    broken = np.ones(layer.down.shape[1], dtype=np.float32)
    broken[4] = np.nan
    layer.down.scale_columns(broken)
    layer.write()
    with pytest.raises(CompressionError) as caught:
        rescaled(model, INT4, tiny_fp32)
    assert caught.value.code == "weights-not-finite"
    assert str(caught.value) == (
        "model.layers.1.mlp.down_proj.weight holds weights that are not finite; fetch the checkpoint again"
    )


def test_model_without_decoder_layers_is_refused() -> None:
    from openvino import opset13 as ops

    x = ops.parameter([1, 4], np.float32)
    with pytest.raises(CompressionError) as caught:
        find_layers(openvino.Model([ops.relu(x)], [x]))
    assert caught.value.code == "layers-missing"


@pytest.mark.slow
def test_a_layer_that_is_not_written_leaves_the_model(model: Any, tiny_fp32: Path) -> None:
    before = logits(model)
    equalise(Decoder.of(model, tiny_fp32), texts(), INT4)
    assert np.array_equal(logits(model), before)
