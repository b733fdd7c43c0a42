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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import resources
from .decoder_graph import Layer, find_layers
from .errors import CompressionError
from .rounding import Quantizer, search_scales

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

__all__ = ["FP16_PEAK", "Equalised", "emulate_fp16", "equalise"]

# Where |up| may rise to in fp16, its square is 16,384: a quarter of fp16's 65,504, for text that was not measured.
FP16_PEAK = 128.0
# The largest |up| that does not overflow when it is squared in fp16.
FP16_LIMIT = float(np.sqrt(65504.0))
# Calibration tokens that are run, memory for what is kept of them, and tokens on which rounding is compared.
OBSERVED_TOKENS = 4096
KEPT_BYTES = 2e9
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
    """What calibration text makes of one layer: rows are tokens."""

    attention: Array  # (tokens, hidden), input of q, k, v
    heads: Array  # (tokens, heads * head_dim), input of o_proj
    mlp: Array  # (tokens, hidden), input of up_proj
    peaks: Array  # (intermediate,), largest |up_proj output| of all tokens


def equalise(
    model: Any,
    samples: Sequence[dict[str, Any]],
    quantizer: Quantizer | None,
    *,
    on_layer: Callable[[int, int], None] | None = None,
) -> Equalised:
    """Rescale the weights of an uncompressed IR in place; its function stays what it was.

    Args:
        model: `openvino.Model` with fp32, fp16 or bf16 weights.
        samples: Inputs of the model, one sample each.
        quantizer: What the weights will be rounded to; None only keeps squares within fp16.
        on_layer: Gets layers done and layers in all.

    Raises:
        CompressionError: A weight or an activation is not finite, or the model has no decoder layer that is known.
        OVAFMError: Memory does not hold it.
    """
    layers = find_layers(model)
    _check_finite(layers)
    weights = sum(layer.elements for layer in layers)
    resources.check_memory(4.0 * weights + KEPT_BYTES + 1e9, "equalisation")
    samples = _enough(samples)
    found = _observe(model, layers, samples)
    errors: dict[str, list[tuple[float, float]]] = {}
    guarded = 0
    for index, (layer, seen) in enumerate(zip(layers, found, strict=True)):
        if quantizer is not None:
            _fold_attention(layer, seen, quantizer, errors)
            _fold_mlp_input(layer, seen, quantizer, errors)
        if layer.relu2:
            guarded += _fold_neurons(layer, seen, quantizer, errors)
        layer.write()
        if on_layer:
            on_layer(index + 1, len(layers))
    peak = max((float(seen.peaks.max()) for seen in found if seen.peaks.size), default=0.0)
    tokens = sum(sample["input_ids"].shape[1] for sample in samples)
    ratios = {
        name: sum(after for _, after in pairs) / max(sum(before for before, _ in pairs), 1e-30)
        for name, pairs in errors.items()
    }
    return Equalised(len(layers), tokens, peak, guarded, ratios)


def _enough(samples: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Evenly spaced samples, so that every source of a mixture is among them."""
    wanted = max(1, OBSERVED_TOKENS // max(1, samples[0]["input_ids"].shape[1]))
    return samples[:: max(1, -(-len(samples) // wanted))]


def _check_finite(layers: Sequence[Layer]) -> None:
    for layer in layers:
        for matrix in layer.matrices():
            if not np.isfinite(matrix.value).all():
                msg = f"{matrix.name} holds weights that are not finite; fetch the checkpoint again"
                raise CompressionError(msg)


# -- What calibration text does in the model


def _observe(model: Any, layers: Sequence[Layer], samples: Sequence[dict[str, Any]]) -> list[_Activations]:
    import openvino
    from openvino import opset13 as ops

    kept = _tokens_kept(layers, samples)
    probe = model.clone()
    copies = find_layers(probe)
    ports: list[Any] = []
    for layer in copies:
        ports += [layer.attention_input, layer.heads_input, layer.mlp_input]
        if layer.relu2:
            peak = ops.reduce_max(ops.absolute(layer.up_output), np.array([0, 1], dtype=np.int64), keep_dims=False)
            ports.append(peak.output(0))
    first = len(probe.outputs)
    probe.add_outputs(ports)
    compiled = openvino.Core().compile_model(probe, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    random = np.random.default_rng(0)
    rows: list[list[Array]] = [[] for _ in ports]
    for sample in samples:
        length = sample["input_ids"].shape[1]
        chosen = np.sort(random.choice(length, min(length, kept), replace=False))
        # A new request starts from an empty cache.
        request = compiled.create_infer_request()
        request.infer(sample)
        for slot, values in enumerate(rows):
            data = request.get_output_tensor(first + slot).data
            values.append((data[0][chosen] if data.ndim == 3 else data[None]).astype(np.float32))
    return _collect(copies, rows)


def _tokens_kept(layers: Sequence[Layer], samples: Sequence[dict[str, Any]]) -> int:
    """Tokens of each sample that are kept, so that all layers fit in `KEPT_BYTES`."""
    per_token = 4 * sum(2 * layer.hidden + layer.o.value.shape[1] for layer in layers)
    return max(1, int(KEPT_BYTES / per_token / len(samples)))


def _collect(layers: Sequence[Layer], rows: list[list[Array]]) -> list[_Activations]:
    found, at = [], 0
    for layer in layers:
        attention, heads, mlp = (np.concatenate(rows[at + slot]) for slot in range(3))
        at += 3
        peaks = np.zeros(0, dtype=np.float32)
        if layer.relu2:
            peaks = np.concatenate(rows[at]).max(0)
            at += 1
        if not all(np.isfinite(part).all() for part in (attention, heads, mlp, peaks)):
            msg = f"layer {layer.index} gives activations that are not finite on the calibration text"
            raise CompressionError(msg)
        found.append(_Activations(attention, heads, mlp, peaks))
    return found


# -- The folds; each changes its matrices in memory and, where needed, the activations that go with them


def _sampled(activations: Array) -> Array:
    step = max(1, len(activations) // SEARCH_TOKENS)
    return activations[::step]


def _fold_attention(layer: Layer, seen: _Activations, quantizer: Quantizer, errors: dict[str, Any]) -> None:
    stacked = np.concatenate([layer.q.value, layer.k.value, layer.v.value])
    scales = _search(stacked, _sampled(seen.attention), quantizer, errors, "qkv")
    for matrix in (layer.q, layer.k, layer.v):
        matrix.scale_columns(scales)
    layer.attention_norm.value /= scales
    # Query heads of one group read the same value head: (kv_heads, heads per group, head_dim) → one scale for all.
    width, shared = layer.v.value.shape[0], layer.o.value.shape[1] // layer.v.value.shape[0]
    if width % layer.head_dim or not shared:
        return
    kv_heads = width // layer.head_dim

    def tie(values: Array) -> Array:
        grouped = values.reshape(kv_heads, shared, layer.head_dim)
        mean = np.exp(np.log(grouped).mean(1, keepdims=True))
        return np.broadcast_to(mean, grouped.shape).reshape(-1).astype(np.float32)

    scales = _search(layer.o.value, _sampled(seen.heads), quantizer, errors, "o", tie=tie)
    layer.o.scale_columns(scales)
    layer.v.scale_rows(1.0 / scales.reshape(kv_heads, shared, layer.head_dim)[:, 0].reshape(-1))


def _fold_mlp_input(layer: Layer, seen: _Activations, quantizer: Quantizer, errors: dict[str, Any]) -> None:
    readers = layer.mlp_readers
    stacked = np.concatenate([matrix.value for matrix in readers]) if len(readers) > 1 else readers[0].value
    scales = _search(stacked, _sampled(seen.mlp), quantizer, errors, "up")
    for matrix in readers:
        matrix.scale_columns(scales)
    layer.mlp_norm.value /= scales
    seen.mlp = seen.mlp / scales


def _fold_neurons(layer: Layer, seen: _Activations, quantizer: Quantizer | None, errors: dict[str, Any]) -> int:
    """Scale neurons by the homogeneity of relu²; returns how many were scaled down for fp16."""
    scales = np.ones(layer.down.value.shape[1], dtype=np.float32)
    if quantizer is not None:
        hidden = np.square(np.maximum(_sampled(seen.mlp) @ layer.up.value.T, 0.0))
        scales = _search(layer.down.value, hidden, quantizer, errors, "down")
    # Powers of two in both directions are exact: 4^-k for a column of `down_proj` is 2^k for its row of `up_proj`.
    peaks = seen.peaks / np.sqrt(scales)
    over = np.maximum(peaks / FP16_PEAK, 1.0)
    shrink = np.exp2(np.ceil(np.log2(over))).astype(np.float32)
    scales = scales * shrink**2
    layer.down.scale_columns(scales)
    layer.up.scale_rows((1.0 / np.sqrt(scales)).astype(np.float32))
    return int((shrink > 1).sum())


def _search(
    weight: Array,
    activations: Array,
    quantizer: Quantizer,
    errors: dict[str, Any],
    kind: str,
    *,
    tie: Callable[[Array], Array] | None = None,
) -> Array:
    scales, before, after = search_scales(weight, activations, quantizer, tie=tie)
    errors.setdefault(kind, []).append((before, after))
    return scales


def emulate_fp16(model: Any, samples: Sequence[dict[str, Any]]) -> float:
    """Run every ReLU² MLP of an uncompressed IR in fp16 on its real inputs.

    Args:
        model: `openvino.Model`; not changed.
        samples: Inputs of the model.

    Returns:
        Share of the neurons' values that are not finite in fp16; 0 where nothing overflows.
    """
    layers = [layer for layer in find_layers(model) if layer.relu2]
    found = _observe(model, layers, samples)
    lost = total = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for layer, seen in zip(layers, found, strict=True):
            inputs, rows = seen.mlp.astype(np.float16), layer.up.value.astype(np.float16)
            # Products of fp16 values, summed in f32 and stored in fp16, as GPUs do.
            up = (inputs.astype(np.float32) @ rows.astype(np.float32).T).astype(np.float16)
            hidden = np.square(np.maximum(up, np.float16(0)))
            columns = layer.down.value.astype(np.float16)
            out = (hidden.astype(np.float32) @ columns.astype(np.float32).T).astype(np.float16)
            lost += int((~np.isfinite(hidden)).sum()) + int((~np.isfinite(out)).sum())
            total += hidden.size + out.size
    return lost / total if total else 0.0
