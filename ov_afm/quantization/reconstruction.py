"""Rounding layer by layer: each matrix is fitted to the inputs that it really gets from the rounded layers before it.

Two streams of calibration text run side by side, one through the layers as they were, one through the layers as they
are stored. A matrix W reads X in the first and Y in the second. What is rounded is not W but the matrix that brings
W's outputs back, W + (W·(X - Y) + R)·Yᵀ·(Y·Yᵀ + λI)⁻¹: R is what the residual stream has lost so far, for the two
matrices that add to it. `gptq` then rounds it and carries errors over from column to column.

The formats, groups and sizes that NNCF chose stay; codes, scales and zero points are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..system import resources
from ..system.child_process import Progress, emit
from .decoder_layer import DecoderLayer, streams
from .decoder_weights import Decoder, Layer, Weight, constant_as_f32
from .gptq import inverse_root, round_with_feedback
from .quantized_constants import QuantizedMatrix, find_quantized, replace_float

if TYPE_CHECKING:
    # Batches of the exact stream, and of the rounded one.
    Pair = tuple[list[Any], list[Any]]

__all__ = ["fit"]


def fit(decoder: Decoder, compressed: Any, samples: Sequence[Sequence[int]]) -> int:
    """Give the decoder layers of a compressed IR better codes, in place.

    Args:
        decoder: Decoder of the IR that NNCF was given, rescaled or not; NNCF need not know the scales of matrices.
        compressed: What NNCF made of it.
        samples: Calibration tokens.

    Returns:
        Matrices that were rounded.

    Raises:
        CompressionError: The model's layers are not those of transformers' model of that name.
        OVAFMError: Memory does not hold one layer and its statistics.
    """
    import torch

    layers, quantized = decoder.layers, find_quantized(compressed)
    tokens, (hidden, widest) = sum(map(len, samples)), layers[0].down.shape
    # Gram matrices and what is made of them, both streams and what they give, two layers.
    resources.check_memory(4.0 * (7 * widest**2 + 2 * tokens * (hidden + widest) + 2 * layers[0].elements), "rounding")
    with torch.inference_mode():
        exact, rounded = (DecoderLayer(decoder.folder) for _ in range(2))
        before = streams(samples, constant_as_f32(decoder.embedding))
        table = quantized.get(decoder.embedding.get_friendly_name())
        after = streams(samples, table.value()) if table else list(before)
        count = 0
        for index, layer in enumerate(layers):
            exact.load(layer)
            rounded.load(layer)
            _LayerRounding(exact, rounded, layer, quantized).run(before, after)
            for matrix in layer.matrices():
                if matrix.key in quantized:
                    count += 1
                elif matrix.rescaled:  # NNCF left it as it is and does not know its scales.
                    replace_float(compressed, matrix.key, matrix.value)
            layer.forget()
            emit(Progress(index + 1, len(layers), "rounding"))
    return count


class _LayerRounding:
    """The rounding of one layer."""

    def __init__(
        self, exact: DecoderLayer, rounded: DecoderLayer, layer: Layer, quantized: dict[str, QuantizedMatrix]
    ) -> None:
        self.exact, self.rounded, self.layer, self.quantized = exact, rounded, layer, quantized

    def run(self, before: list[Any], after: list[Any]) -> None:
        """Round all matrices and move the streams, lists of batches, past the layer."""
        layer, streams = self.layer, (before, after)
        inputs = self._each(lambda decoder, x: decoder.layer.input_layernorm(x), streams)
        self._round(inputs, "self_attn", {"q_proj": layer.q, "k_proj": layer.k, "v_proj": layer.v})
        inputs = self._each(lambda decoder, x: decoder.attend(x), inputs)
        self._round(inputs, "self_attn", {"o_proj": layer.o}, streams)
        self._add(streams, self._each(lambda decoder, x: decoder.layer.self_attn.o_proj(x), inputs))
        inputs = self._each(lambda decoder, x: decoder.layer.post_attention_layernorm(x), streams)
        gate = {} if layer.gate is None else {"gate_proj": layer.gate}
        self._round(inputs, "mlp", {"up_proj": layer.up, **gate})
        inputs = self._each(lambda decoder, x: decoder.hidden(x), inputs)
        self._round(inputs, "mlp", {"down_proj": layer.down}, streams)
        self._add(streams, self._each(lambda decoder, x: decoder.layer.mlp.down_proj(x), inputs))

    def _each(self, function: Callable[[DecoderLayer, Any], Any], streams: Pair) -> Pair:
        """A function of the exact layer on the first stream, of the rounded layer on the second."""
        before, after = streams
        return [function(self.exact, x) for x in before], [function(self.rounded, x) for x in after]

    @staticmethod
    def _add(streams: Pair, values: Pair) -> None:
        for stream, added in zip(streams, values, strict=True):
            stream[:] = [x + y for x, y in zip(stream, added, strict=True)]

    def _round(self, inputs: Pair, block: str, matrices: dict[str, Weight], streams: Pair | None = None) -> None:
        """Round matrices that read the same; with the streams, if what they give is added to them."""
        root, moved_inputs, lost = _statistics(inputs, streams)
        for name, matrix in matrices.items():
            target = self.quantized.get(matrix.key)
            if target is None:
                continue
            module = getattr(getattr(self.rounded.layer, block), name)
            moved = module.weight @ moved_inputs + lost
            result = round_with_feedback(module.weight + moved @ root.T @ root, root, target.quantizer)
            module.weight.copy_(result.weight)
            target.write(result.codes.numpy(), result.scale.numpy(), result.zero.numpy())


def _statistics(inputs: Pair, streams: Pair | None) -> tuple[Any, Any, Any]:
    """U with UᵀU = (Y·Yᵀ + λI)⁻¹, (X - Y)·Yᵀ and R·Yᵀ, tokens along the inner dimension."""
    import torch

    width = inputs[0][0].shape[-1]
    gram, moved = torch.zeros(width, width), torch.zeros(width, width)
    lost = torch.zeros(1, width) if streams is None else torch.zeros(streams[0][0].shape[-1], width)
    for at, (x, y) in enumerate(zip(*inputs, strict=True)):
        rows = y.reshape(-1, width)
        gram.addmm_(rows.T, rows)
        moved.addmm_((x - y).reshape(-1, width).T, rows)
        if streams is not None:
            before, after = streams
            lost.addmm_((before[at] - after[at]).reshape(len(rows), -1).T, rows)
    return inverse_root(gram), moved, lost
