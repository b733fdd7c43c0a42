"""Forms of `config.json`: rope, heads, activations, types."""

from __future__ import annotations

from support.crafted import Case

CASES: list[Case] = []
