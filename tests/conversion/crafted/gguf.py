"""GGUF files: types, tokenizers, splits."""

from __future__ import annotations

from support.crafted import Case

CASES: list[Case] = []
