"""How much to take away from a decoder, and where: from a number of parameters to a shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import ConfigError
from ..model_dir import manifest

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
        heads: Query heads that stay in every layer.
        kv_heads: KV heads that stay in every layer.
        vocab: Rows that stay in embedding and head.
        narrowed: Whether anything but rows of the vocabulary goes.
        parameters: Of the result, norms left out.
        before: Of the source.
        reason: Why it was chosen, for people.
    """

    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    narrowed: bool
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
        raise ConfigError(f"{text!r} is no number of parameters; give one such as 2.8B or 120M")
    return int(float(match[1]) * UNITS[match[2]])


def plan(
    config: Mapping[str, Any], target: int | None = None, *, vocab: int | None = None, kv_heads: int | None = None
) -> Plan:
    """The largest shape of at most `target` parameters, through the MLPs alone where that is not too narrow.

    Args:
        config: Contents of the source's `config.json`.
        target: Number of parameters, norms left out; None where `vocab` and `kv_heads` say all.
        vocab: Rows of embedding and head that stay; None for all.
        kv_heads: KV heads that stay in every layer, with their query heads; None for all.

    Raises:
        ConfigError: The target is not below what the model has, or below what can be reached; or `kv_heads` is a number
            that the model cannot have; or nothing would go.
    """
    source = manifest.geometry_of(config)
    tied = bool(config.get("tie_word_embeddings"))
    before = _count(source, tied)
    if target is not None and target >= before:
        raise ConfigError(
            f"the model has {before / 1e9:.3f} B parameters already, no more than the target of {target / 1e9:.3f} B"
        )
    shape = {**source, "vocab": source["vocab"] if vocab is None else vocab}
    reasons = [] if vocab is None else [f"{vocab} of {source['vocab']} rows of the vocabulary"]
    if kv_heads is not None:
        if config.get("attention_bias"):
            raise ConfigError("KV heads are pruned in attention without biases; config.json has attention_bias")
        shape |= _heads(source, kv_heads)
        queries = f"{shape['heads']} of {source['heads']} query heads"
        reasons.append(f"{kv_heads} of {source['kv_heads']} KV heads and {queries} in each layer")
    if target is None and _count(shape, tied) == before:
        raise ConfigError(
            "nothing would go: all rows of the vocabulary and all KV heads stay; ask for fewer, or --target-params"
        )
    if target is not None and target < _count(shape, tied):
        layers, intermediate, reason = _layers(shape, tied, target)
        shape |= {"layers": layers, "intermediate": intermediate}
        reasons.append(reason)
    return Plan(
        layers=shape["layers"],
        intermediate=shape["intermediate"],
        heads=shape["heads"],
        kv_heads=shape["kv_heads"],
        vocab=shape["vocab"],
        narrowed={**shape, "vocab": source["vocab"]} != source,
        parameters=_count(shape, tied),
        before=before,
        reason="; ".join(reasons),
    )


def _heads(shape: Mapping[str, Any], kv_heads: int) -> dict[str, int]:
    """Query and KV heads where so many KV heads stay."""
    if not 1 <= kv_heads <= shape["kv_heads"]:
        raise ConfigError(f"KV heads to keep must be 1 to {shape['kv_heads']}, found {kv_heads}")
    group = shape["heads"] // shape["kv_heads"]
    # transformers refuses other configurations, though none of its code needs that where head_dim is given.
    possible = [count for count in range(1, shape["kv_heads"] + 1) if shape["hidden"] % (count * group) == 0]
    if kv_heads not in possible:
        raise ConfigError(
            f"{kv_heads} KV heads leave {kv_heads * group} query heads, and transformers wants a number that divides "
            f"the hidden size {shape['hidden']}; KV heads to keep may be {', '.join(map(str, possible))}"
        )
    return {"heads": kv_heads * group, "kv_heads": kv_heads}


def _layers(shape: Mapping[str, Any], tied: bool, target: int) -> tuple[int, int, str]:
    """Layers, neurons of each MLP, and why."""
    width = _width(shape, tied, target, shape["layers"])
    if width >= NARROWEST_ALONE * shape["intermediate"]:
        reason = f"the MLPs alone: {width} of {shape['intermediate']} neurons in each, all {shape['layers']} layers"
        return shape["layers"], width, reason
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
        raise ConfigError(
            f"{target / 1e9:.3f} B parameters cannot be reached: embedding, head and the smallest layers have "
            f"{minimum / 1e9:.3f} B; give at least that"
        )
    _, layers, width = min(reachable)
    reason = (
        f"{layers} of {shape['layers']} layers and {width} of {shape['intermediate']} neurons in each: the MLPs alone "
        f"would have to keep less than {NARROWEST_ALONE:.0%}"
    )
    return layers, width, reason


def _count(shape: Mapping[str, Any], tied: bool) -> int:
    return sum(manifest.parameters(shape, tied=tied))


def _width(shape: Mapping[str, Any], tied: bool, target: int, layers: int) -> int:
    """Neurons of each MLP that the target leaves room for; not positive where it leaves none."""
    without = _count({**shape, "layers": layers, "intermediate": 0}, tied)
    neuron = _count({**shape, "layers": layers, "intermediate": 1}, tied) - without
    return (target - without) // neuron // MULTIPLE * MULTIPLE


def _up(width: float) -> int:
    return -(-int(width) // MULTIPLE) * MULTIPLE
