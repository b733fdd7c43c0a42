"""Structured pruning with torch: layers by block influence, neurons by output energy, `down_proj` refitted.

One forward pass over the calibration text prunes all MLPs from the first to the last, each on the inputs that the
layers pruned before it give, so that a layer sees what it will see later.

`h` (neurons, tokens) is the MLP's hidden activation, `W` its down_proj. Kept are the neurons S of largest
E[h_j²]·|W_j|². Then W_S takes over by least squares what it can of all that is missing from the residual stream by
then, its own dropped neurons' output and what earlier layers could not make up for: the correction Δ minimises
|Δ·h_S − m|² + λ|Δ|², which is Δ = m·h_Sᵀ·(h_S·h_Sᵀ + λI)⁻¹.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from . import calibration
from .checkpoint import license_files
from .errors import CompressionError
from .supervise import emit

__all__ = ["block_influence", "prune_checkpoint", "prune_mlps"]

# λ, relative to the mean of H_SS's diagonal. Calibration tokens are about as many as neurons, so it must not be tiny.
RIDGE = 0.02
BATCH = 8
SPEED_TOKENS = 256


def prune_checkpoint(
    source: str, output: str, layers: int, intermediate: int, dataset: str, num_samples: int, refit: bool
) -> dict[str, Any]:
    """Write a pruned checkpoint; returns what was dropped, and prefill speed before and after in tokens/s."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    dtype = AutoConfig.from_pretrained(source).dtype or torch.float32
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    _check_finite(model)
    samples, data = calibration.prepare(dataset, tokenizer, num_samples)
    ids = [sample for sample in samples if len(sample) == calibration.SAMPLE_TOKENS] or samples[:1]
    before = _speed(model, ids[0])
    dropped: list[int] = []
    if layers < model.config.num_hidden_layers:
        emit("step", name="ranking layers")
        dropped = _drop_layers(model, ids, layers)
    emit("step", name="pruning MLPs")
    kept_energy = prune_mlps(model, ids, intermediate, refit=refit)
    after = _speed(model, ids[0])
    model.to(dtype).save_pretrained(output)
    tokenizer.save_pretrained(output)
    _copy_texts(Path(source), Path(output))
    return {
        "calibration": data,
        "layers_dropped": dropped,
        "energy_kept": kept_energy,
        "prefill_tokens_per_s": {"before": round(before, 1), "after": round(after, 1)},
    }


def _check_finite(model: Any) -> None:
    import torch

    for name, value in model.named_parameters():
        if not torch.isfinite(value).all():
            msg = f"{name} holds weights that are not finite; fetch the checkpoint again"
            raise CompressionError(msg)


def _speed(model: Any, ids: list[int]) -> float:
    import torch

    batch = torch.tensor([ids[:SPEED_TOKENS]])
    with torch.inference_mode():
        model(batch, use_cache=False)
        started = time.perf_counter()
        model(batch, use_cache=False)
    return float(batch.shape[1] / (time.perf_counter() - started))


def _batches(ids: list[list[int]]) -> Any:
    import torch

    return [torch.tensor(ids[start : start + BATCH]) for start in range(0, len(ids), BATCH)]


def block_influence(model: Any, ids: list[list[int]]) -> list[float]:
    """1 − cos(input, output) of each decoder layer, mean over tokens (ShortGPT, https://arxiv.org/abs/2403.03853)."""
    import torch

    sums, count = [0.0] * len(model.model.layers), 0

    def watch(index: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            cosine = torch.nn.functional.cosine_similarity(inputs[0], out, dim=-1)
            sums[index] += float((1 - cosine).sum())

        return hook

    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(model.model.layers)]
    try:
        with torch.inference_mode():
            for batch in _batches(ids):
                model.model(batch, use_cache=False)
                count += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    return [value / count for value in sums]


def _drop_layers(model: Any, ids: list[list[int]], layers: int) -> list[int]:
    influence = block_influence(model, ids)
    ranked = sorted(range(len(influence)), key=influence.__getitem__)
    dropped = sorted(ranked[: len(influence) - layers])
    kept = [layer for index, layer in enumerate(model.model.layers) if index not in dropped]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = type(model.model.layers)(kept)
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for index, kind in enumerate(model.config.layer_types) if index not in dropped]
    return dropped


def prune_mlps(model: Any, ids: list[list[int]], intermediate: int, *, refit: bool = True) -> float:
    """Narrow every ReLU² MLP of a transformers model in place.

    Args:
        model: In float32.
        ids: Calibration samples of one length.
        intermediate: Neurons that stay in each MLP.
        refit: Refit `down_proj` by least squares.

    Returns:
        Share of the neurons' output energy that stays, mean over layers.
    """
    import torch

    shares: list[float] = []
    layers = model.model.layers
    inputs = torch.tensor(ids)
    with torch.no_grad():
        wanted = _streams(model, inputs) if refit else [None] * len(layers)

    def narrowed(layer: Any, want: Any) -> Any:
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        before: list[Any] = []
        handle = norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))

        def forward(x: Any) -> Any:
            handle.remove()
            missing = None if want is None else (want - before[0]).flatten(0, 1)
            shares.append(_prune_mlp(mlp, x.flatten(0, 1), intermediate, missing))
            emit("progress", done=len(shares), total=len(layers))
            return type(mlp).forward(mlp, x)

        return forward

    for layer, want in zip(layers, wanted, strict=True):
        layer.mlp.forward = narrowed(layer, want)
    try:
        with torch.no_grad():
            model.model(inputs, use_cache=False)
    finally:
        for layer in layers:
            del layer.mlp.forward
    model.config.intermediate_size = intermediate
    return sum(shares) / len(shares)


def _streams(model: Any, inputs: Any) -> list[Any]:
    """The residual stream after each layer of the model as it is."""
    found: list[Any] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in model.model.layers]
    try:
        model.model(inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _prune_mlp(mlp: Any, x: Any, intermediate: int, wanted: Any | None) -> float:
    """Narrow one MLP; `wanted` (tokens, hidden) is what it should add to the residual stream, None for no refit."""
    import torch

    hidden = torch.relu(x @ mlp.up_proj.weight.T).square()  # (tokens, neurons)
    down = mlp.down_proj.weight
    energy = hidden.square().mean(0) * down.square().sum(0)
    order = energy.argsort(descending=True)
    # Kept neurons stay in the order that they had.
    kept = order[:intermediate].sort().values
    narrow = down[:, kept]
    if wanted is not None:
        seen = hidden[:, kept]
        gram = seen.T @ seen
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        missing = wanted - seen @ narrow.T
        narrow = narrow + torch.linalg.solve(gram, seen.T @ missing).T
    share = float(energy[kept].sum() / energy.sum().clamp(min=1e-30))
    for matrix, value in ((mlp.up_proj, mlp.up_proj.weight[kept]), (mlp.down_proj, narrow)):
        matrix.weight = torch.nn.Parameter(value.contiguous(), requires_grad=False)
        matrix.out_features, matrix.in_features = value.shape
    mlp.intermediate_size = intermediate
    return share


def _copy_texts(source: Path, output: Path) -> None:
    """Carry licence files and template of a checkpoint along."""
    extra = [source / "chat_template.jinja", source / "generation_config.json"]
    for path in (*license_files(source), *extra):
        if path.is_file() and not (output / path.name).exists():
            shutil.copyfile(path, output / path.name)
