"""Whether an export fits this machine's disk and memory, before it begins."""

from __future__ import annotations

from pathlib import Path

from ..model_dir import manifest
from ..presets import Recipe
from ..system import resources
from .sources import Source

__all__ = ["BASE_BYTES", "check_fit", "parameters"]

# What Python, torch, Optimum and NNCF take before the first weight is read.
BASE_BYTES = 2e9


def parameters(source: Source) -> tuple[int, int]:
    """Weights of embedding and head, and of the layers; see `manifest.parameters`."""
    tied = bool(source.config.get("tie_word_embeddings"))
    return manifest.parameters(manifest.geometry_of(source.config), tied=tied)


def check_fit(source: Source, settings: Recipe, partial: Path, work: Path) -> None:
    """Refuse with figures before starting what disk or memory cannot hold.

    Raises:
        OVAFMError: It does not fit.
    """
    shape = manifest.geometry_of(source.config)
    tables, layers = parameters(source)
    stored = (layers + tables) * {"fp32": 4, "fp16": 2}.get(settings.weight_format, 2)
    if settings.bits <= 8:
        scales = 2.0 / settings.group_size if settings.group_size > 0 else 0.0
        final = tables * 1.01 + layers * (settings.bits / 8 + scales)
    else:
        final = stored
    if work.parent == partial and settings.bits <= 8:
        resources.check_disk(partial, {"the uncompressed IR": stored, "the model": final})
    else:
        resources.check_disk(work, {"the uncompressed IR": stored})
        resources.check_disk(partial, {"the model": final})
    # Weights are mapped from their file and can be dropped from memory; new types are made in memory.
    largest = 4.0 * shape["hidden"] * max(shape["vocab"], shape["intermediate"])
    in_memory = 2 * largest + (final if settings.bits <= 8 else stored)
    resources.check_memory(BASE_BYTES + in_memory, "this export")
