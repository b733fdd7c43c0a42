"""Exact rescalings of a decoder's weights, so that quantizing them costs less and fp16 does not overflow.

For any s > 0, relu(s·a)² = s²·relu(a)²: row j of `up_proj` times s and column j of `down_proj` divided by s² leave
the function as it was. A row's own scale is free in every quantizer here, so this moves range between the columns
of `down_proj` at no cost at all. The same is done at the input of `up_proj` and of q, k, v, through the weight of the
RMSNorm before them, and between `v_proj` and `o_proj`, where the heads that share a value head share its scale.

The scales are searched as AWQ does (https://arxiv.org/abs/2306.00978, equation 5), but for each quantization group by
itself and under the quantizer that will be used: what is minimised is the error of the layer's output on calibration
text. NNCF's own AWQ knows no pattern that fits this MLP and does nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CompressionError
from ..system import resources
from ..system.child_process import Progress, emit
from .decoder_layer import DecoderLayer, streams
from .decoder_weights import Decoder, Layer, constant_as_f32
from .quantizer import Array, Quantizer, search_scales

__all__ = ["FP16_LIMIT", "FP16_PEAK", "Equalised", "equalise"]

# Where |up| may rise to in fp16, its square is 16,384: a quarter of fp16's 65,504, for text that was not measured.
FP16_PEAK = 128.0
# The largest |up| that does not overflow when it is squared in fp16.
FP16_LIMIT = float(np.sqrt(65504.0))
# Output error before and after, of each layer, by kind of matrix.
Errors = defaultdict[str, list[list[float]]]
# Calibration tokens that are run, and tokens on which rounding is compared.
OBSERVED_TOKENS = 4096
SEARCH_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Equalised:
    """What was rescaled.

    Attributes:
        layers: Number of decoder layers.
        tokens: Calibration tokens that were run.
        peak_up: Largest |up_proj output| before, over all layers.
        guarded: Neurons that were scaled down for fp16.
        error: Output error under the quantizer after the search, relative to before, by kind of matrix.
    """

    layers: int
    tokens: int
    peak_up: float
    guarded: int
    error: dict[str, float]

    def recorded(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "layers": self.layers,
            "tokens": self.tokens,
            "peak_up": round(self.peak_up, 3),
            "fp16_guarded_neurons": self.guarded,
            "error_ratio": {name: round(value, 4) for name, value in self.error.items()},
        }


@dataclass(slots=True)
class _Activations:
    """What calibration text makes of one layer: rows are some of the tokens."""

    peaks: Array  # (intermediate,), largest |up_proj output| of all tokens
    attention: Array  # (tokens, hidden), input of q, k, v
    heads: Array  # (tokens, heads * head_dim), input of o_proj
    mlp: Array  # (tokens, hidden), input of up_proj


def equalise(
    decoder: Decoder,
    samples: Sequence[Sequence[int]],
    quantizer: Quantizer | None,
    *,
    kinds: Mapping[str, Quantizer] | None = None,
) -> Equalised:
    """Rescale the layers of an uncompressed IR. Once all of them are written, its function is what it was.

    Args:
        decoder: Decoder with fp32, fp16 or bf16 weights.
        samples: Calibration tokens.
        quantizer: What the weights will be rounded to; None only keeps squares within fp16.
        kinds: Rounding of kinds of matrices that have one of their own; where `gate` and `up` differ, `up` counts.

    Raises:
        CompressionError: A weight or an activation is not finite, or transformers' model of that name has other layers.
        OVAFMError: Memory does not hold a layer and what it makes of the text.
    """
    samples = _enough(samples)
    tokens = sum(map(len, samples))
    layers = decoder.layers
    widest = sum(layers[0].down.shape)
    # A layer twice, the stream and three activations, the hidden activation.
    resources.check_memory(4.0 * (2 * layers[0].elements + 5 * tokens * widest) + 1e9, "equalisation")
    module, stream = DecoderLayer(decoder.folder), streams(samples, constant_as_f32(decoder.embedding))
    errors: Errors = defaultdict(list)
    guarded, peak = 0, 0.0
    attention, up, down = ((kinds or {}).get(kind, quantizer) for kind in ("attention", "up", "down"))
    for index, layer in enumerate(layers):
        _check_finite(layer)
        activations = _observe(module, layer, stream)
        peak = max(peak, float(activations.peaks.max(initial=0.0)))
        if attention is not None:
            _fold_attention(layer, activations, attention, errors)
        if up is not None:
            _fold_mlp_input(layer, activations, up, errors)
        if layer.relu2:
            guarded += _fold_neurons(layer, activations, down, errors)
        layer.forget()
        emit(Progress(index + 1, len(layers), "equalising"))
    ratios = {
        name: sum(after for _, after in pairs) / max(sum(before for before, _ in pairs), 1e-30)
        for name, pairs in errors.items()
    }
    return Equalised(len(layers), tokens, peak, guarded, ratios)


def _enough(samples: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """Evenly spaced samples, so that every source of a mixture is among them."""
    count = max(1, OBSERVED_TOKENS // max(1, len(samples[0])))
    return samples[:: max(1, -(-len(samples) // count))]


def _check_finite(layer: Layer) -> None:
    for matrix in layer.matrices():
        if not np.isfinite(matrix.value).all():
            raise CompressionError(
                f"{matrix.name} holds weights that are not finite; fetch the checkpoint again",
                code="weights-not-finite",
            )


def _observe(module: DecoderLayer, layer: Layer, stream: list[Any]) -> _Activations:
    """What a layer makes of calibration text; the stream, a list of batches, is moved past it."""
    import torch

    module.load(layer)
    inner = module.layer
    with torch.inference_mode():
        attention = [inner.input_layernorm(x) for x in stream]
        heads = [module.attend(x) for x in attention]
        stream[:] = [x + inner.self_attn.o_proj(y) for x, y in zip(stream, heads, strict=True)]
        mlp = [inner.post_attention_layernorm(x) for x in stream]
        peaks = np.zeros(0, dtype=np.float32)
        if layer.relu2:
            peaks = torch.stack([inner.mlp.up_proj(x).abs().amax((0, 1)) for x in mlp]).amax(0).numpy()
        stream[:] = [x + inner.mlp.down_proj(module.hidden(y)) for x, y in zip(stream, mlp, strict=True)]
    rows = [_rows(each) for each in (attention, heads, mlp)]
    if not all(np.isfinite(part).all() for part in (*rows, peaks)):
        raise CompressionError(f"layer {layer.index} gives activations that are not finite on the calibration text")
    return _Activations(peaks, *(each[:: max(1, len(each) // SEARCH_TOKENS)] for each in rows))


def _rows(batches: list[Any]) -> Array:
    """Batches (samples, tokens, width) as one matrix, a token a row."""
    import torch

    rows: Array = torch.cat([batch.flatten(0, 1) for batch in batches]).numpy()
    return rows


# The functions that follow change matrices in memory and, where needed, the activations that go with them.


def _fold_attention(layer: Layer, activations: _Activations, quantizer: Quantizer, errors: Errors) -> None:
    stacked = np.concatenate([layer.q.value, layer.k.value, layer.v.value])
    scales, *error = search_scales(stacked, activations.attention, quantizer)
    errors["qkv"].append(error)
    for matrix in (layer.q, layer.k, layer.v):
        matrix.scale_columns(scales)
    layer.attention_norm.scale_columns(1.0 / scales)
    # Query heads of one group read the same value head: (kv_heads, heads per group, head_dim) → one scale for all.
    width, shared = layer.v.shape[0], layer.o.shape[1] // layer.v.shape[0]
    if width % layer.head_dim or not shared:
        return
    kv_heads = width // layer.head_dim

    def tie(values: Array) -> Array:
        grouped = values.reshape(kv_heads, shared, layer.head_dim)
        mean = np.exp(np.log(grouped).mean(1, keepdims=True))
        return np.broadcast_to(mean, grouped.shape).reshape(-1).astype(np.float32)

    scales, *error = search_scales(layer.o.value, activations.heads, quantizer, tie=tie)
    errors["o"].append(error)
    layer.o.scale_columns(scales)
    layer.v.scale_rows(1.0 / scales.reshape(kv_heads, shared, layer.head_dim)[:, 0].reshape(-1))


def _fold_mlp_input(layer: Layer, activations: _Activations, quantizer: Quantizer, errors: Errors) -> None:
    readers = layer.mlp_readers
    stacked = np.concatenate([matrix.value for matrix in readers]) if len(readers) > 1 else readers[0].value
    scales, *error = search_scales(stacked, activations.mlp, quantizer)
    errors["up"].append(error)
    for matrix in readers:
        matrix.scale_columns(scales)
    layer.mlp_norm.scale_columns(1.0 / scales)
    activations.mlp = activations.mlp / scales


def _fold_neurons(layer: Layer, activations: _Activations, quantizer: Quantizer | None, errors: Errors) -> int:
    """Scale neurons by the homogeneity of relu²; returns how many were scaled down for fp16."""
    scales = np.ones(layer.down.shape[1], dtype=np.float32)
    if quantizer is not None:
        hidden = np.square(np.maximum(activations.mlp @ layer.up.value.T, 0.0))
        scales, *error = search_scales(layer.down.value, hidden, quantizer)
        errors["down"].append(error)
    # Powers of two in both directions are exact: 4^-k for a column of `down_proj` is 2^k for its row of `up_proj`.
    peaks = activations.peaks / np.sqrt(scales)
    over = np.maximum(peaks / FP16_PEAK, 1.0)
    shrink = np.exp2(np.ceil(np.log2(over))).astype(np.float32)
    scales = scales * shrink**2
    layer.down.scale_columns(scales)
    layer.up.scale_rows((1.0 / np.sqrt(scales)).astype(np.float32))
    return int((shrink > 1).sum())
