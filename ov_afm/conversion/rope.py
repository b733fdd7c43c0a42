"""Rotary embeddings that an export computes as transformers does at every position, and no others.

transformers reads several forms of the same thing and is silent about what it does not use. Two kinds choose their
frequencies by the length of the prompt, which a traced graph cannot: it would keep those of a short one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import SourceError

__all__ = ["check_rope"]

COMMON = {"rope_type", "type", "rope_theta"}
# Fields of each kind: those that it needs, and those that it may have. `finetuned` says nothing about computing.
KINDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "finetuned",
        },
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
}
NUMBERS = {"rope_theta", *KINDS["yarn"][0], *KINDS["yarn"][1], *KINDS["llama3"][0]} - {"truncate", "finetuned"}
BY_LENGTH = ("dynamic", "longrope", "su")


def check_rope(config: Mapping[str, Any], where: str) -> None:
    """Refuse a rotary embedding that an export would not compute exactly, or that could be meant in two ways.

    Args:
        config: Contents of `config.json`.
        where: What to call the model in messages.

    Raises:
        SourceError: Names the field.
    """
    problem = _problem(config)
    if problem is not None:
        raise SourceError(f"config.json of {where}: {problem}", code="rope-unsupported")


def _problem(config: Mapping[str, Any]) -> str | None:
    given = {key: config[key] for key in ("rope_scaling", "rope_parameters") if config.get(key)}
    for key, rope in given.items():
        if not isinstance(rope, dict):
            return f"{key} is {str(rope)[:40]}, where an object is needed"
        if any(isinstance(value, dict) for value in rope.values()):
            return f"{key} has a rotary embedding for each type of layer, and the architecture has one type"
    if len(given) == 2 and _settled(config, given["rope_scaling"]) != _settled(config, given["rope_parameters"]):
        return "rope_scaling and rope_parameters contradict each other; delete the one that is wrong"
    factor = config.get("partial_rotary_factor", 1.0)
    if factor not in (None, 1.0):
        return f"partial_rotary_factor is {factor}, and the architecture rotates whole heads"
    for key, rope in given.items():
        if (problem := _problem_of(config, rope)) is not None:
            return f"{key} {problem}"
    return None


def _settled(config: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under one name each."""
    theta = rope.get("rope_theta", config.get("rope_theta"))
    rest = {key: value for key, value in rope.items() if key not in COMMON}
    return {**rest, "rope_type": _kind(rope), "rope_theta": theta}


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _problem_of(config: Mapping[str, Any], rope: Mapping[str, Any]) -> str | None:
    kind = _kind(rope)
    if "type" in rope and rope["type"] != kind:
        return f"has type {rope['type']} and rope_type {kind}; delete the one that is wrong"
    theta = config.get("rope_theta")
    if None not in (theta, rope.get("rope_theta")) and theta != rope["rope_theta"]:
        return f"has rope_theta {rope['rope_theta']}, and beside it is {theta}; delete the one that is wrong"
    if kind in BY_LENGTH:
        return (
            f"is of kind {kind}, which depends on the prompt's length: an exported graph would be wrong beyond the "
            "trained context; delete the scaling to keep that context, or use a model with a static one (yarn, llama3)"
        )
    if kind not in KINDS:
        return f"is of kind {kind}; supported are {', '.join(KINDS)}"
    needed, allowed = KINDS[kind]
    for key, value in rope.items():
        if key in NUMBERS and value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"has {key} {str(value)[:40]!r}, where a number is needed"
    missing = sorted(needed - {key for key, value in rope.items() if value is not None})
    if missing:
        return f"of kind {kind} lacks {missing[0]}"
    unknown = sorted(rope.keys() - needed - allowed - COMMON)
    if unknown:
        return f"of kind {kind} has {unknown[0]} {rope[unknown[0]]}, which would have no effect; delete what is wrong"
    return None
