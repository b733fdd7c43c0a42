"""Rounding layer by layer: each matrix is fitted to the inputs that the rounded layers before it really give.

Two streams of calibration text run side by side, through the layers as they were and through the layers as they are
stored. A matrix W reads X in the first and Y in the second. What is rounded is not W but the matrix that brings W's
outputs back, W + (W·(X - Y) + R)·Yᵀ·(Y·Yᵀ + λI)⁻¹: R is what the residual stream has lost so far, for the two
matrices that add to it. `feedback` then rounds it, errors carried over from column to column.

It works on what NNCF has made: formats, groups and sizes stay, codes, scales and zero points are replaced.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import resources
from .decoder_graph import Layer, Weight, constant_as_f32, find_layers
from .errors import CompressionError
from .feedback import inverse_root, round_with_feedback
from .stored import Stored, stored_matrices

if TYPE_CHECKING:
    # Batches of the exact stream, and of the rounded one.
    Pair = tuple[list[Any], list[Any]]

__all__ = ["fit"]

# The table itself, not its scales or zero points.
EMBEDDING = re.compile(r"embed_tokens\.[a-z_]+$|embed_tokens$")
# Samples that are run together.
BATCH = 8


def fit(
    original: Any,
    compressed: Any,
    samples: Sequence[Sequence[int]],
    folder: Path,
    *,
    on_layer: Callable[[int, int], None] | None = None,
) -> int:
    """Give the decoder layers of a compressed IR better codes, in place.

    Args:
        original: The IR that NNCF was given.
        compressed: What it made of it.
        samples: Calibration tokens.
        folder: Where the model's `config.json` is.
        on_layer: Gets layers done and layers in all.

    Returns:
        Matrices that were rounded.

    Raises:
        CompressionError: The model's layers are not those of transformers' model of that name.
    """
    import torch

    stored = stored_matrices(compressed)
    layers = find_layers(original)
    tokens, (hidden, widest) = sum(map(len, samples)), layers[0].down.constant.get_output_shape(0)
    # Gram matrices and what is made of them, both streams and what they give, two layers.
    resources.check_memory(4.0 * (7 * widest**2 + 2 * tokens * (hidden + widest) + 2 * layers[0].elements), "rounding")
    with torch.inference_mode():
        exact, rounded = (_Decoder(folder) for _ in range(2))
        before = _batches(samples, _embedding(original))
        after = _batches(samples, _embedding(compressed, stored))
        done = 0
        for index, layer in enumerate(layers):
            exact.load(layer)
            rounded.load(layer)
            done += _Step(exact, rounded, layer, stored).run(before, after)
            if on_layer:
                on_layer(index + 1, len(layers))
    return done


def _embedding(model: Any, stored: dict[str, Stored] | None = None) -> Any:
    import torch

    for node in model.get_ops():
        name = node.get_friendly_name()
        if EMBEDDING.search(name) and node.get_type_name() == "Constant" and len(node.get_output_shape(0)) == 2:
            known = (stored or {}).get(name)
            return torch.from_numpy(constant_as_f32(node) if known is None else known.value())
    msg = "the model's token embedding was not found; fitted rounding knows models that `ov-afm export` makes"
    raise CompressionError(msg)


def _batches(samples: Sequence[Sequence[int]], embedding: Any) -> list[Any]:
    """Residual streams (samples, tokens, hidden) of samples of one length each."""
    import torch

    by_length: dict[int, list[Sequence[int]]] = {}
    for sample in samples:
        by_length.setdefault(len(sample), []).append(sample)
    cut = [rows[at : at + BATCH] for rows in by_length.values() for at in range(0, len(rows), BATCH)]
    return [torch.nn.functional.embedding(torch.tensor(rows), embedding) for rows in cut]


class _Decoder:
    """One decoder layer of transformers, with the weights of any layer."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoConfig, AutoModel

        config = copy.deepcopy(AutoConfig.from_pretrained(folder))
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        model = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.layer, self.rotary = model.layers[0], model.rotary_emb

    def load(self, layer: Layer) -> None:
        """Take the weights of a layer of the IR."""
        import torch

        norms = {"input_layernorm.weight": layer.attention_norm, "post_attention_layernorm.weight": layer.mlp_norm}
        # Read anew each time: kept, they would be the whole model at f32.
        weights = {name: torch.from_numpy(constant_as_f32(each.constant)).reshape(-1) for name, each in norms.items()}
        weights |= {name: torch.from_numpy(constant_as_f32(each.constant)) for name, each in _named(layer)}
        try:
            self.layer.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            msg = f"layer {layer.index} is not the layer of {type(self.layer).__name__}: {' '.join(str(error).split())}"
            raise CompressionError(msg) from error

    def attend(self, normed: Any) -> Any:
        """The input of `o_proj`."""
        import torch

        positions = torch.arange(normed.shape[1])[None]
        return _input_of(
            self.layer.self_attn.o_proj,
            lambda: self.layer.self_attn(
                hidden_states=normed, attention_mask=None, position_embeddings=self.rotary(normed, positions)
            ),
        )

    def hidden(self, normed: Any) -> Any:
        """The input of `down_proj`."""
        return _input_of(self.layer.mlp.down_proj, lambda: self.layer.mlp(normed))


def _named(layer: Layer) -> list[tuple[str, Any]]:
    named = [(f"self_attn.{name}_proj.weight", getattr(layer, name)) for name in "qkvo"]
    named += [("mlp.up_proj.weight", layer.up), ("mlp.down_proj.weight", layer.down)]
    return named if layer.gate is None else [*named, ("mlp.gate_proj.weight", layer.gate)]


class _Reached(Exception):
    """What was to be seen has been seen."""


def _input_of(module: Any, run: Callable[[], Any]) -> Any:
    seen: list[Any] = []

    def keep(_: Any, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])
        raise _Reached

    handle = module.register_forward_pre_hook(keep)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


class _Step:
    """The rounding of one layer."""

    def __init__(self, exact: _Decoder, rounded: _Decoder, layer: Layer, stored: dict[str, Stored]) -> None:
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

    def _each(self, function: Callable[[_Decoder, Any], Any], streams: Pair) -> Pair:
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
            stored = self.stored.get(matrix.constant.get_friendly_name())
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
