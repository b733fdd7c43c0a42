"""A pruned checkpoint, with torch: layers go by block influence, then neurons and heads (see `width`)."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ..conversion import source_tokenizer
from ..conversion.checkpoint import license_files
from ..conversion.tensors import load
from ..errors import CompressionError
from ..model_dir.geometry import Geometry
from ..model_dir.tokenizer_files import ADDITIONAL_TEMPLATES, TEMPLATE_FILE
from ..quantization import calibration
from ..runtime.generation_config import FILE_NAME as GENERATION_CONFIG
from ..system.child_process import Step, emit
from .width import narrow

__all__ = ["block_influence", "check_finite", "copy_texts", "prune_checkpoint"]

BATCH = 8
SPEED_TOKENS = 256


def prune_checkpoint(
    source: Path, output: Path, shape: Geometry, *, dataset: str, num_samples: int, refit: bool
) -> dict[str, Any]:
    """Write a pruned checkpoint.

    Args:
        source: The checkpoint.
        output: Folder of the new one.
        shape: Layers, neurons and KV heads that stay.
        dataset: Calibration text, see `calibration`.
        num_samples: Samples of it.
        refit: Let what stays take over what it can, by least squares.

    Returns:
        What was dropped, and prefill speed before and after in tokens/s.

    Raises:
        OVAFMError: The checkpoint is not what its files and its configuration say, or a weight is not finite.
    """
    tokenizer = source_tokenizer.load(source)
    loaded = load(source, "float32")
    model = loaded.model
    check_finite(model)
    ids, data = calibration.whole_samples(dataset, tokenizer, num_samples)
    before = _speed(model, ids[0])
    dropped: list[int] = []
    config = model.config
    if shape.layers < config.num_hidden_layers:
        emit(Step("ranking layers"))
        dropped = _drop_layers(model, ids, shape.layers)
    emit(Step("narrowing layers"))
    intermediate = shape.intermediate if shape.intermediate < config.intermediate_size else None
    kv_heads = shape.kv_heads if shape.kv_heads < config.num_key_value_heads else None
    kept = narrow(model, ids, intermediate=intermediate, kv_heads=kv_heads, refit=refit)
    after = _speed(model, ids[0])
    model.to(loaded.stored).save_pretrained(output)
    tokenizer.save_pretrained(output)
    copy_texts(source, output)
    return {
        "calibration": data,
        "layers_dropped": dropped,
        "energy_kept": _mean(kept.neurons),
        "attention_energy_kept": _mean(kept.attention),
        "kv_heads_kept": kept.kv_heads,
        "prefill_tokens_per_s": {"before": round(before, 1), "after": round(after, 1)},
    }


def _mean(shares: list[float]) -> float | None:
    return sum(shares) / len(shares) if shares else None


def check_finite(model: Any) -> None:
    """Refuse a model with a weight that is not finite.

    Raises:
        CompressionError: With its name.
    """
    import torch

    for name, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise CompressionError(f"{name} holds weights that are not finite; fetch the checkpoint again")


def _speed(model: Any, ids: list[int]) -> float:
    import torch

    batch = torch.tensor([ids[:SPEED_TOKENS]])
    with torch.inference_mode():
        model(batch, use_cache=False)
        started = time.perf_counter()
        model(batch, use_cache=False)
    return float(batch.shape[1] / (time.perf_counter() - started))


def block_influence(model: Any, ids: list[list[int]]) -> list[float]:
    """1 − cos(input, output) of each decoder layer, mean over tokens (ShortGPT, https://arxiv.org/abs/2403.03853)."""
    import torch

    tokens, sums = torch.tensor(ids), [0.0] * len(model.model.layers)

    def watch(index: int, _: Any, inputs: Any, output: Any) -> None:
        cosine = torch.nn.functional.cosine_similarity(inputs[0], output, dim=-1)
        sums[index] += float((1 - cosine).sum())

    with torch.inference_mode(), ExitStack() as hooks:
        for index, layer in enumerate(model.model.layers):
            hooks.callback(layer.register_forward_hook(partial(watch, index)).remove)
        for batch in tokens.split(BATCH):
            model.model(batch, use_cache=False)
    return [value / tokens.numel() for value in sums]


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


def copy_texts(source: Path, output: Path) -> None:
    """Carry licence files, chat templates and generation configuration of a checkpoint along, byte for byte.

    transformers writes some of them too, but not what it does not understand.
    """
    names = (TEMPLATE_FILE, "chat_template.json", GENERATION_CONFIG)
    templates = sorted((source / ADDITIONAL_TEMPLATES).glob("*.jinja"))
    for path in (*license_files(source), *(source / name for name in names), *templates):
        if path.is_file():
            (output / path.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, output / path.relative_to(source))
