"""The tokens that end an answer, wherever a source names them."""

from __future__ import annotations

from support.crafted import Case

CASES: list[Case] = []
