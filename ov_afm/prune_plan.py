"""How much to take away from a decoder, and where: from a number of parameters to a shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from . import manifest
from .errors import ConfigError

__all__ = ["Plan", "parse_count", "plan"]

# Where MLPs alone would have to be narrower than this share, layers go too: a choice of ours, not a measured bound.
NARROWEST_ALONE = 0.4
SMALLEST_SHARE = 0.1
# Widths that vector units and quantization groups like.
MULTIPLE = 64
UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True, slots=True)
class Plan:
    """The shape of a pruned model.

    Attributes:
        layers: Decoder layers that stay.
        intermediate: Neurons that stay in every MLP; one width for all, which every engine can load.
        parameters: Of the result, norms left out.
        before: Of the source.
        reason: Why it was chosen, for people.
    """

    layers: int
    intermediate: int
    parameters: int
    before: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def parse_count(text: str) -> int:
    """A number of parameters such as `2.8B`, `120M` or `5000000`.

    Raises:
        ConfigError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper())
    if not match or float(match[1]) == 0:
        msg = f"{text!r} is no number of parameters; give one such as 2.8B or 120M"
        raise ConfigError(msg)
    return int(float(match[1]) * UNITS[match[2]])


def plan(config: Mapping[str, Any], target: int) -> Plan:
    """The largest shape of at most `target` parameters, through the MLPs alone where that is not too narrow.

    Args:
        config: Contents of the source's `config.json`.
        target: Number of parameters, norms left out.

    Raises:
        ConfigError: The target is not below what the model has, or below what can be reached.
    """
    shape = manifest.geometry_of(config)
    tied = bool(config.get("tie_word_embeddings"))
    before = _count(shape, tied)
    if target >= before:
        msg = f"the model has {before / 1e9:.3f} B parameters already, no more than the target of {target / 1e9:.3f} B"
        raise ConfigError(msg)
    width = _width(shape, tied, target, shape["layers"])
    if width >= NARROWEST_ALONE * shape["intermediate"]:
        reason = f"the MLPs alone: {width} of {shape['intermediate']} neurons in each, all {shape['layers']} layers"
        return Plan(shape["layers"], width, _count({**shape, "intermediate": width}, tied), before, reason)
    # Depth and width by about the same share: of the layer counts, the one whose shares lie closest.
    reachable = []
    for layers in range(max(1, round(SMALLEST_SHARE * shape["layers"])), shape["layers"]):
        width = min(_width(shape, tied, target, layers), shape["intermediate"])
        if width >= max(MULTIPLE, SMALLEST_SHARE * shape["intermediate"]):
            distance = abs(layers / shape["layers"] - width / shape["intermediate"])
            reachable.append((distance, layers, width))
    if not reachable:
        layers = max(1, round(SMALLEST_SHARE * shape["layers"]))
        width = max(MULTIPLE, _up(SMALLEST_SHARE * shape["intermediate"]))
        minimum = _count({**shape, "layers": layers, "intermediate": width}, tied)
        msg = (
            f"{target / 1e9:.3f} B parameters cannot be reached: embedding, head and the smallest layers have "
            f"{minimum / 1e9:.3f} B; give at least that"
        )
        raise ConfigError(msg)
    _, layers, width = min(reachable)
    reason = (
        f"{layers} of {shape['layers']} layers and {width} of {shape['intermediate']} neurons in each: the MLPs alone "
        f"would have to keep less than {NARROWEST_ALONE:.0%}"
    )
    return Plan(layers, width, _count({**shape, "layers": layers, "intermediate": width}, tied), before, reason)


def _count(shape: Mapping[str, Any], tied: bool) -> int:
    return sum(manifest.parameters(shape, tied=tied))


def _width(shape: Mapping[str, Any], tied: bool, target: int, layers: int) -> int:
    """Neurons of each MLP that the target leaves room for; not positive where it leaves none."""
    without = _count({**shape, "layers": layers, "intermediate": 0}, tied)
    neuron = _count({**shape, "layers": layers, "intermediate": 1}, tied) - without
    return (target - without) // neuron // MULTIPLE * MULTIPLE


def _up(width: float) -> int:
    return -(-int(width) // MULTIPLE) * MULTIPLE
