"""Rounding layer by layer: each matrix is fitted to the inputs that the rounded layers before it really give.

Two streams of calibration text run side by side, through the layers as they were and through the layers as they are
stored. A matrix W reads X in the first and Y in the second. What is rounded is not W but the matrix that brings W's
outputs back, W + (W·(X - Y) + R)·Yᵀ·(Y·Yᵀ + λI)⁻¹: R is what the residual stream has lost so far, for the two
matrices that add to it. `feedback` then rounds it, errors carried over from column to column.

It works on what NNCF has made: formats, groups and sizes stay, codes, scales and zero points are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..system import resources
from .decoder_layer import DecoderLayer, embedded, streams
from .decoder_weights import Layer, Weight
from .gptq import inverse_root, round_with_feedback
from .quantized_constants import Stored, put, stored_matrices

if TYPE_CHECKING:
    # Batches of the exact stream, and of the rounded one.
    Pair = tuple[list[Any], list[Any]]

__all__ = ["fit"]


def fit(
    layers: Sequence[Layer],
    table: Any,
    compressed: Any,
    samples: Sequence[Sequence[int]],
    folder: Path,
    *,
    on_layer: Callable[[int, int], None] | None = None,
) -> int:
    """Give the decoder layers of a compressed IR better codes, in place.

    Args:
        layers: Layers of the IR that NNCF was given, rescaled or not; NNCF need not have seen the scales of matrices.
        table: Constant of that IR's token embedding.
        compressed: What NNCF made of it.
        samples: Calibration tokens.
        folder: Where the model's `config.json` is.
        on_layer: Gets layers done and layers in all.

    Returns:
        Matrices that were rounded.

    Raises:
        CompressionError: The model's layers are not those of transformers' model of that name.
        OVAFMError: Memory does not hold one layer and its statistics.
    """
    import torch

    stored = stored_matrices(compressed)
    tokens, (hidden, widest) = sum(map(len, samples)), layers[0].down.shape
    # Gram matrices and what is made of them, both streams and what they give, two layers.
    resources.check_memory(4.0 * (7 * widest**2 + 2 * tokens * (hidden + widest) + 2 * layers[0].elements), "rounding")
    with torch.inference_mode():
        exact, rounded = (DecoderLayer(folder) for _ in range(2))
        before = embedded(samples, table)
        known = stored.get(table.get_friendly_name())
        after = streams(samples, torch.from_numpy(known.value())) if known else list(before)
        done = 0
        for index, layer in enumerate(layers):
            exact.load(layer)
            rounded.load(layer)
            done += _Step(exact, rounded, layer, stored).run(before, after)
            _write_others(layer, stored, compressed)
            if on_layer:
                on_layer(index + 1, len(layers))
    return done


def _write_others(layer: Layer, stored: dict[str, Stored], compressed: Any) -> None:
    """Rescale what NNCF left as it is: it has not seen the scales."""
    for matrix in layer.matrices():
        if matrix.rescaled and matrix.key not in stored:
            put(compressed, matrix.key, matrix.value)
    layer.forget()


class _Step:
    """The rounding of one layer."""

    def __init__(self, exact: DecoderLayer, rounded: DecoderLayer, layer: Layer, stored: dict[str, Stored]) -> None:
        self.exact, self.rounded, self.layer, self.stored = exact, rounded, layer, stored
        self.done = 0

    def run(self, before: list[Any], after: list[Any]) -> int:
        """Round all matrices; the streams, lists of batches, are moved past the layer."""
        layer, streams = self.layer, (before, after)
        seen = self._each(lambda decoder, x: decoder.layer.input_layernorm(x), streams)
        self._round(seen, "self_attn", {"q_proj": layer.q, "k_proj": layer.k, "v_proj": layer.v})
        seen = self._each(lambda decoder, x: decoder.attend(x), seen)
        self._round(seen, "self_attn", {"o_proj": layer.o}, streams)
        self._add(streams, self._each(lambda decoder, x: decoder.layer.self_attn.o_proj(x), seen))
        seen = self._each(lambda decoder, x: decoder.layer.post_attention_layernorm(x), streams)
        gate = {} if layer.gate is None else {"gate_proj": layer.gate}
        self._round(seen, "mlp", {"up_proj": layer.up, **gate})
        seen = self._each(lambda decoder, x: decoder.hidden(x), seen)
        self._round(seen, "mlp", {"down_proj": layer.down}, streams)
        self._add(streams, self._each(lambda decoder, x: decoder.layer.mlp.down_proj(x), seen))
        return self.done

    def _each(self, function: Callable[[DecoderLayer, Any], Any], streams: Pair) -> Pair:
        """A function of the exact layer on the first stream, of the rounded layer on the second."""
        before, after = streams
        return [function(self.exact, x) for x in before], [function(self.rounded, x) for x in after]

    @staticmethod
    def _add(streams: Pair, values: Pair) -> None:
        for stream, added in zip(streams, values, strict=True):
            stream[:] = [x + y for x, y in zip(stream, added, strict=True)]

    def _round(self, seen: Pair, block: str, matrices: dict[str, Weight], streams: Pair | None = None) -> None:
        """Round matrices that read the same; with the streams, if what they give is added to them."""
        root, moved_inputs, lost = _statistics(seen, streams)
        for name, matrix in matrices.items():
            stored = self.stored.get(matrix.key)
            if stored is None:
                continue
            module = getattr(getattr(self.rounded.layer, block), name)
            moved = module.weight @ moved_inputs + lost
            result = round_with_feedback(module.weight + moved @ root.T @ root, root, stored.quantizer)
            module.weight.copy_(result.weight)
            stored.write(result.codes.numpy(), result.scale.numpy(), result.zero.numpy())
            self.done += 1


def _statistics(seen: Pair, streams: Pair | None) -> tuple[Any, Any, Any]:
    """U with UᵀU = (Y·Yᵀ + λI)⁻¹, (X - Y)·Yᵀ and R·Yᵀ, tokens along the inner dimension."""
    import torch

    width = seen[0][0].shape[-1]
    gram, moved = torch.zeros(width, width), torch.zeros(width, width)
    lost = torch.zeros(1, width) if streams is None else torch.zeros(streams[0][0].shape[-1], width)
    for at, (x, y) in enumerate(zip(*seen, strict=True)):
        inputs = y.reshape(-1, width)
        gram.addmm_(inputs.T, inputs)
        moved.addmm_((x - y).reshape(-1, width).T, inputs)
        if streams is not None:
            before, after = streams
            lost.addmm_((before[at] - after[at]).reshape(len(inputs), -1).T, inputs)
    return inverse_root(gram), moved, lost
