"""Chat templates: where they are kept, and what they render."""

from __future__ import annotations

from support.crafted import Case

CASES: list[Case] = []
