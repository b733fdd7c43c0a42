"""Run calibration text through a decoder, one layer at a time, in transformers' layer with the weights of an IR.

A whole AFM-4.5B at f32 takes 18 GB; one of its layers takes half a gigabyte, and the residual stream of 8,192 tokens
84 MB.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import CompressionError
from .decoder_weights import Layer, Weight
from .quantizer import Array

__all__ = ["DecoderLayer", "streams"]

# Samples that are run together.
BATCH = 8


def streams(samples: Sequence[Sequence[int]], table: Array) -> list[Any]:
    """Batches of the residual stream (samples, tokens, hidden) as it enters the first layer, each of one sample length.

    Args:
        samples: Tokens.
        table: The embedding (vocabulary, hidden).
    """
    import torch

    by_length: dict[int, list[Sequence[int]]] = {}
    for sample in samples:
        by_length.setdefault(len(sample), []).append(sample)
    batches = [rows[at : at + BATCH] for rows in by_length.values() for at in range(0, len(rows), BATCH)]
    weight = torch.from_numpy(table)
    return [torch.nn.functional.embedding(torch.tensor(rows), weight) for rows in batches]


class DecoderLayer:
    """One decoder layer of transformers that takes the weights of any layer of an IR.

    Args:
        folder: Where the model's `config.json` is.

    Attributes:
        layer: The module.
    """

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
        """Take the weights of a layer of the IR, rescaled as they are.

        Raises:
            CompressionError: The architecture has other weights.
        """
        import torch

        norms = {"input_layernorm.weight": layer.attention_norm, "post_attention_layernorm.weight": layer.mlp_norm}
        weights = {name: torch.from_numpy(each.value).reshape(-1) for name, each in norms.items()}
        weights |= {name: torch.from_numpy(each.value) for name, each in _named(layer)}
        # Held by the module from here on.
        layer.forget()
        try:
            self.layer.load_state_dict(weights, strict=True, assign=True)
        except RuntimeError as error:
            raise CompressionError(
                f"layer {layer.index} is not the layer of {type(self.layer).__name__}: {' '.join(str(error).split())}",
                code="layer-unknown",
            ) from error

    def attend(self, normed: Any) -> Any:
        """The input of `o_proj`."""
        import torch

        attention, rotary = self.layer.self_attn, self.rotary(normed, torch.arange(normed.shape[1])[None])
        return _input_of(
            attention.o_proj,
            lambda: attention(hidden_states=normed, attention_mask=None, position_embeddings=rotary),
        )

    def hidden(self, normed: Any) -> Any:
        """The input of `down_proj`."""
        return _input_of(self.layer.mlp.down_proj, lambda: self.layer.mlp(normed))


def _named(layer: Layer) -> list[tuple[str, Weight]]:
    named = [(f"self_attn.{name}_proj.weight", getattr(layer, name)) for name in "qkvo"]
    named += [("mlp.up_proj.weight", layer.up), ("mlp.down_proj.weight", layer.down)]
    return named if layer.gate is None else [*named, ("mlp.gate_proj.weight", layer.gate)]


class _Reached(Exception):
    """Ends a forward pass once the value that is needed was captured."""


def _input_of(module: Any, run: Callable[[], Any]) -> Any:
    """What a module gets while `run` runs, which ends there."""
    captured: list[Any] = []

    def capture(_: Any, inputs: tuple[Any, ...]) -> None:
        captured.append(inputs[0])
        raise _Reached

    handle = module.register_forward_pre_hook(capture)
    try:
        with contextlib.suppress(_Reached):
            run()
    finally:
        handle.remove()
    return captured[0]
