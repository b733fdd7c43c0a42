"""Forms of a tokenizer."""

from __future__ import annotations

from support.crafted import Case

CASES: list[Case] = []
