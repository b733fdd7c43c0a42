"""How much to take away from a decoder, and where: from a number of parameters to a shape."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError
from ..model_dir.geometry import Geometry

__all__ = ["Plan", "parse_count", "plan"]

# Where MLPs alone would have to be narrower than this share, layers go too. A choice, not a measured bound.
NARROWEST_ALONE = 0.4
SMALLEST_SHARE = 0.1
# Widths that vector units and quantization groups like.
MULTIPLE = 64
UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True, slots=True)
class Plan:
    """The shape of a pruned model.

    Attributes:
        source: Shape of the original.
        geometry: Shape of the result. All MLPs have one width, which every engine can load.
        tied: Whether embedding and head are one matrix.
        reason: Why it was chosen, for people.
    """

    source: Geometry
    geometry: Geometry
    tied: bool
    reason: str

    @property
    def narrowed(self) -> bool:
        """Whether anything but rows of the vocabulary goes."""
        return replace(self.geometry, vocab=self.source.vocab) != self.source

    @property
    def before(self) -> int:
        """Parameters of the original, norms left out."""
        return self.source.parameters(tied=self.tied)

    @property
    def parameters(self) -> int:
        """Parameters of the result, norms left out."""
        return self.geometry.parameters(tied=self.tied)

    def to_dict(self) -> dict[str, Any]:
        """As the report records it."""
        kept = {name: getattr(self.geometry, name) for name in ("layers", "intermediate", "heads", "kv_heads", "vocab")}
        counts = {"narrowed": self.narrowed, "parameters": self.parameters, "before": self.before}
        return {**kept, **counts, "reason": self.reason}


def parse_count(text: str) -> int:
    """A number of parameters such as `2.8B`, `120M` or `5000000`.

    Raises:
        ConfigError: The text is no such number.
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
        target: Number of parameters, norms left out; None where `vocab` and `kv_heads` decide everything.
        vocab: Rows of embedding and head that stay; None for all.
        kv_heads: KV heads that stay in every layer, with their query heads; None for all.

    Raises:
        ConfigError: The target is not below what the model has, or below what can be reached; or `kv_heads` is a number
            that the model cannot have; or nothing would go.
    """
    source, tied = Geometry.from_config(config), bool(config.get("tie_word_embeddings"))
    before = source.parameters(tied=tied)
    if target is not None and target >= before:
        raise ConfigError(
            f"the model has {before / 1e9:.3f} B parameters already, no more than the target of {target / 1e9:.3f} B"
        )
    shape, reasons = source, []
    if vocab is not None:
        shape = replace(shape, vocab=vocab)
        reasons.append(f"{vocab} of {source.vocab} rows of the vocabulary")
    if kv_heads is not None:
        if config.get("attention_bias"):
            raise ConfigError("KV heads are pruned in attention without biases; config.json has attention_bias")
        shape = _with_heads(shape, kv_heads)
        queries = f"{shape.heads} of {source.heads} query heads"
        reasons.append(f"{kv_heads} of {source.kv_heads} KV heads and {queries} in each layer")
    count = shape.parameters(tied=tied)
    if target is None and count == before:
        raise ConfigError(
            "nothing would go: all rows of the vocabulary and all KV heads stay; ask for fewer, or --target-params",
            code="nothing-to-prune",
        )
    if target is not None and target < count:
        shape, reason = _shrunk(shape, tied, target)
        reasons.append(reason)
    return Plan(source, shape, tied, "; ".join(reasons))


def _with_heads(shape: Geometry, kv_heads: int) -> Geometry:
    """The shape where that many KV heads stay, with their query heads."""
    if not 1 <= kv_heads <= shape.kv_heads:
        raise ConfigError(f"KV heads to keep must be 1 to {shape.kv_heads}, found {kv_heads}")
    group = shape.heads // shape.kv_heads
    # transformers refuses other configurations, though none of its code needs that where head_dim is given.
    possible = [count for count in range(1, shape.kv_heads + 1) if shape.hidden % (count * group) == 0]
    if kv_heads not in possible:
        raise ConfigError(
            f"{kv_heads} KV heads leave {kv_heads * group} query heads, and transformers wants a number that divides "
            f"the hidden size {shape.hidden}; KV heads to keep may be {', '.join(map(str, possible))}"
        )
    return replace(shape, heads=kv_heads * group, kv_heads=kv_heads)


def _shrunk(shape: Geometry, tied: bool, target: int) -> tuple[Geometry, str]:
    """The shape with fewer neurons in each MLP, and fewer layers where needed; and why."""
    width = _width(shape, tied, target)
    if width >= NARROWEST_ALONE * shape.intermediate:
        reason = f"the MLPs alone: {width} of {shape.intermediate} neurons in each, all {shape.layers} layers"
        return replace(shape, intermediate=width), reason
    # Depth and width by about the same share: of the layer counts, the one whose shares lie closest.
    fewest, narrowest = max(1, round(SMALLEST_SHARE * shape.layers)), SMALLEST_SHARE * shape.intermediate
    reachable = []
    for layers in range(fewest, shape.layers):
        width = min(_width(replace(shape, layers=layers), tied, target), shape.intermediate)
        if width >= max(MULTIPLE, narrowest):
            distance = abs(layers / shape.layers - width / shape.intermediate)
            reachable.append((distance, layers, width))
    if not reachable:
        width = max(MULTIPLE, -(-int(narrowest) // MULTIPLE) * MULTIPLE)
        minimum = replace(shape, layers=fewest, intermediate=width).parameters(tied=tied)
        raise ConfigError(
            f"{target / 1e9:.3f} B parameters cannot be reached: embedding, head and the smallest layers have "
            f"{minimum / 1e9:.3f} B; give at least that",
            code="target-out-of-reach",
        )
    _, layers, width = min(reachable)
    reason = (
        f"{layers} of {shape.layers} layers and {width} of {shape.intermediate} neurons in each: the MLPs alone "
        f"would have to keep less than {NARROWEST_ALONE:.0%}"
    )
    return replace(shape, layers=layers, intermediate=width), reason


def _width(shape: Geometry, tied: bool, target: int) -> int:
    """Neurons of each MLP that the target leaves room for; not positive where it leaves none."""
    without, with_one = (replace(shape, intermediate=count).parameters(tied=tied) for count in (0, 1))
    return (target - without) // (with_one - without) // MULTIPLE * MULTIPLE
