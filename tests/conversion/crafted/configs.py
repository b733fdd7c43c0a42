"""Forms of `config.json`: rope, heads, activations, types."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import crafted
from support.crafted import Case, Crafted

THETA = {"rope_theta": 20000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "attention_factor": 0.9,
    "beta_fast": 24.0,
    "beta_slow": 2.0,
    "truncate": False,
}
# Beyond the trained context of all forms.
LONG = tuple((7 * i * i + 3 * i + 11) % 500 for i in range(1, 161))


def old(rope: dict[str, Any], kind: str) -> Callable[[Path], Crafted]:
    """The form of older checkpoints: `rope_scaling` with `type`, `rope_theta` beside it."""

    def make(folder: Path) -> Crafted:
        model = crafted.checkpoint(folder, "llama", rope_parameters={**THETA, "rope_type": kind, **rope})
        crafted.edit_config(folder, rope_parameters=None, rope_scaling={"type": kind, **rope}, **THETA)
        return Crafted(model, prompt=LONG)

    return make


def llama3(folder: Path) -> Crafted:
    return Crafted(crafted.checkpoint(folder, "llama", rope_parameters={**THETA, **LLAMA3}), prompt=LONG)


def refused(**changes: Any) -> Callable[[Path], Crafted]:
    def make(folder: Path) -> Crafted:
        crafted.checkpoint(folder)
        crafted.edit_config(folder, **changes)
        return Crafted()

    return make


def _rope(name: str, form: str, why: str, *says: str, **changes: Any) -> Case:
    return Case(name, form, "refused", why, refused(**changes), code="rope-unsupported", says=says)


BY_LENGTH = "its frequencies depend on the prompt's length, and a graph has those of a short one"
CASES: list[Case] = [
    Case("linear", "`rope_scaling` of type `linear`", "exact", "", old({"factor": 4.0}, "linear")),
    Case(
        "yarn",
        "`rope_scaling` of type `yarn` with all its fields",
        "exact",
        "compared beyond the trained context",
        old(YARN, "yarn"),
    ),
    Case("llama3", "`rope_parameters` of type `llama3`", "exact", "compared beyond the trained context", llama3),
    _rope(
        "dynamic",
        "rope of type `dynamic` (NTK)",
        BY_LENGTH,
        "kind dynamic",
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    _rope(
        "longrope",
        "rope of type `longrope`",
        BY_LENGTH,
        "kind longrope",
        rope_parameters={"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [1.0]},
    ),
    _rope(
        "two-ropes",
        "`rope_scaling` and `rope_parameters` that contradict each other",
        "transformers takes the first without a word",
        "rope_scaling and rope_parameters",
        rope_scaling={"type": "linear", "factor": 2.0},
    ),
    _rope(
        "two-thetas",
        "two values of `rope_theta`",
        "transformers takes the inner one without a word",
        "rope_theta 10000.0, and beside it is 500000.0",
        rope_theta=500000.0,
    ),
    _rope(
        "rope-by-layer",
        "a rope for each type of layer",
        "Arcee and Llama have one type",
        "each type of layer",
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 10000.0}},
    ),
    _rope(
        "partial-rope",
        "`partial_rotary_factor`",
        "Arcee and Llama rotate whole heads",
        "partial_rotary_factor is 0.5",
        partial_rotary_factor=0.5,
    ),
    _rope(
        "rope-without-effect",
        "a field that the kind of rope does not have",
        "transformers ignores it: a factor without a type scales nothing",
        "kind default has factor 8.0",
        rope_parameters={"factor": 8.0, "rope_theta": 10000.0},
    ),
    _rope(
        "rope-incomplete",
        "a kind of rope without a field that it needs",
        "",
        "kind llama3 lacks factor",
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0},
    ),
]
