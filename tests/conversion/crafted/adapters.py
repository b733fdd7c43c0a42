"""LoRA adapters that are merged into their base."""

from __future__ import annotations

from support.crafted import Case

CASES: list[Case] = []
