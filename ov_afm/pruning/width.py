"""Narrow MLPs and attention with torch: neurons and heads by output energy, the matrix behind them refitted.

One forward pass over the calibration text narrows all layers from the first to the last, each on the inputs that the
layers narrowed before it give, so that a layer sees what it will see later.

Both kinds of blocks are treated alike. `h` (features, tokens) is the input of the block's last matrix `W`: an MLP's
hidden activation and its down_proj, or the heads' output and o_proj. Of an MLP the neurons S of largest E[h_j²]·|W_j|²
are kept; of attention the KV heads, with their query heads, of largest E|W_g·h_g|². Then W_S takes over by least
squares what it can of all that is missing from the residual stream by then: the output of its own dropped features, and
what earlier blocks could not make up for. The correction Δ minimises |Δ·h_S − m|² + λ|Δ|², which is
Δ = m·h_Sᵀ·(h_S·h_Sᵀ + λI)⁻¹.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..system.child_process import Progress, emit

__all__ = ["Kept", "narrow"]

# λ, relative to the mean of H_SS's diagonal. Calibration tokens are about as many as neurons, so it must not be tiny.
RIDGE = 0.02


@dataclass
class Kept:
    """What stayed in each layer.

    Attributes:
        neurons: Share of the neurons' output energy, 0 to 1; empty where MLPs were left alone.
        attention: Share of the heads' output energy, 0 to 1; empty where attention was left alone.
        kv_heads: Old indices of the KV heads.
    """

    neurons: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    kv_heads: list[list[int]] = field(default_factory=list)


def narrow(
    model: Any,
    ids: list[list[int]],
    *,
    intermediate: int | None = None,
    kv_heads: int | None = None,
    refit: bool = True,
) -> Kept:
    """Narrow every layer of a transformers model with ReLU² MLPs in place.

    Args:
        model: In float32, without biases.
        ids: Calibration samples of one length.
        intermediate: Neurons that stay in each MLP; None leaves MLPs alone.
        kv_heads: KV heads that stay in each layer, with their query heads; None leaves attention alone.
        refit: Refit `down_proj` and `o_proj`, where narrowed, by least squares.
    """
    import torch

    kept, layers, inputs = Kept(), model.model.layers, torch.tensor(ids)
    with torch.no_grad(), ExitStack() as hooks:
        streams = _streams(model, inputs, kv_heads is not None, intermediate is not None) if refit else None
        for index, layer in enumerate(layers):
            after_attention, after_layer = streams[index] if streams else (None, None)
            if kv_heads is not None:
                run = partial(_narrow_attention, layer.self_attn, kv_heads, kept)
                _replace(hooks, layer.self_attn.o_proj, layer.input_layernorm, after_attention, run)
            if intermediate is not None:
                run = partial(_narrow_mlp, layer.mlp, intermediate, kept)
                _replace(hooks, layer.mlp, layer.post_attention_layernorm, after_layer, run)
            progress = Progress(index + 1, len(layers))
            hooks.callback(layer.register_forward_hook(lambda *_, progress=progress: emit(progress)).remove)
        model.model(inputs, use_cache=False)
    if intermediate is not None:
        model.config.intermediate_size = intermediate
    if kv_heads is not None:
        attention = layers[0].self_attn
        model.config.num_attention_heads = kv_heads * attention.num_key_value_groups
        model.config.num_key_value_heads = kv_heads
        # Without it, transformers would take hidden_size / num_attention_heads, which is no longer right.
        model.config.head_dim = attention.head_dim
    return kept


def _streams(model: Any, inputs: Any, attention: bool, layer: bool) -> list[tuple[Any, Any]]:
    """The residual stream (batch, seq, hidden) of the model as it is, after each layer's attention and after the layer.

    Args:
        model: The model.
        inputs: Token ids (batch, seq).
        attention: Keep the first; otherwise it is None.
        layer: Keep the second; otherwise it is None.
    """
    first: list[Any] = []
    second: list[Any] = []
    with ExitStack() as hooks:
        for each in model.model.layers:
            if attention:
                norm = each.post_attention_layernorm
                hooks.callback(norm.register_forward_pre_hook(lambda _, args: first.append(args[0])).remove)
            if layer:
                hooks.callback(each.register_forward_hook(lambda _, __, out: second.append(out)).remove)
        model.model(inputs, use_cache=False)
    nothing = [None] * len(model.model.layers)
    return list(zip(first or nothing, second or nothing, strict=True))


def _replace(hooks: ExitStack, module: Any, norm: Any, expected: Any | None, run: Callable[[Any, Any], Any]) -> None:
    """Let `run(input, missing)` replace a module's forward until `hooks` are closed.

    Args:
        hooks: Undoes it.
        module: What writes to the residual stream.
        norm: What reads the residual stream before it.
        expected: What the stream should be after it (batch, seq, hidden); None for no refit.
        run: Narrows the module and returns its output; `missing` (tokens, hidden) is what that output should be.
    """
    before: list[Any] = []
    if expected is not None:
        hooks.callback(norm.register_forward_pre_hook(lambda _, args: before.append(args[0])).remove)

    def forward(x: Any) -> Any:
        return run(x, None if expected is None else (expected - before.pop()).flatten(0, 1))

    module.forward = forward
    hooks.callback(delattr, module, "forward")


def _narrow_mlp(mlp: Any, intermediate: int, kept: Kept, x: Any, missing: Any | None) -> Any:
    """Narrow one MLP.

    Args:
        mlp: The MLP.
        intermediate: Neurons to keep.
        kept: Gets the share of energy that stays.
        x: Its input (batch, seq, hidden).
        missing: What it should give (tokens, hidden); None for no refit.

    Returns:
        Its output.
    """
    import torch

    hidden = torch.relu(x.flatten(0, 1) @ mlp.up_proj.weight.T).square()  # (tokens, neurons)
    down = mlp.down_proj.weight
    neurons, share = _largest(hidden.square().mean(0) * down.square().sum(0), intermediate)
    kept.neurons.append(share)
    _set(mlp.up_proj, mlp.up_proj.weight[neurons])
    _set(mlp.down_proj, _refitted(down[:, neurons], hidden[:, neurons], missing))
    mlp.intermediate_size = intermediate
    return type(mlp).forward(mlp, x)


def _narrow_attention(attention: Any, kv_heads: int, kept: Kept, x: Any, missing: Any | None) -> Any:
    """Narrow one attention block.

    Args:
        attention: The block.
        kv_heads: KV heads to keep.
        kept: Gets the KV heads that stay, and their share of energy.
        x: What goes into o_proj (batch, seq, query heads · head_dim).
        missing: What o_proj should give (tokens, hidden); None for no refit.

    Returns:
        What o_proj gives.
    """
    import torch

    width = attention.num_key_value_groups * attention.head_dim  # of one KV head's query heads
    inputs, out = x.flatten(0, 1), attention.o_proj.weight  # (hidden, query heads · head_dim)
    outputs = [part @ weight.T for part, weight in zip(inputs.split(width, 1), out.split(width, 1), strict=True)]
    groups, share = _largest(torch.stack([each.square().sum(-1).mean() for each in outputs]), kv_heads)
    kept.attention.append(share)
    kept.kv_heads.append(groups.tolist())
    columns, rows = _spread(groups, width), _spread(groups, attention.head_dim)
    _set(attention.q_proj, attention.q_proj.weight[columns])
    _set(attention.k_proj, attention.k_proj.weight[rows])
    _set(attention.v_proj, attention.v_proj.weight[rows])
    _set(attention.o_proj, _refitted(out[:, columns], inputs[:, columns], missing))
    return type(attention.o_proj).forward(attention.o_proj, x[..., columns])


def _largest(energy: Any, count: int) -> tuple[Any, float]:
    """Indices of the largest energies, in the order that they had, and their share of the whole."""
    kept = energy.argsort(descending=True)[:count].sort().values
    return kept, float(energy[kept].sum() / energy.sum().clamp(min=1e-30))


def _spread(heads: Any, width: int) -> Any:
    """Indices of the rows of some heads that have `width` rows each."""
    import torch

    return (heads[:, None] * width + torch.arange(width)).flatten()


def _refitted(weight: Any, inputs: Any, expected: Any | None) -> Any:
    """A matrix (hidden, features), refitted so that `inputs` (tokens, features) give `expected` (tokens, hidden).

    Without `expected` it stays as it is.
    """
    if expected is None:
        return weight
    import torch

    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    return weight + torch.linalg.solve(gram, inputs.T @ (expected - inputs @ weight.T)).T


def _set(linear: Any, weight: Any) -> None:
    import torch

    linear.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)
    linear.out_features, linear.in_features = weight.shape
