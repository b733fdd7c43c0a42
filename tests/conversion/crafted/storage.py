"""Weight files: which of the files in a folder are the model."""

from __future__ import annotations

from support.crafted import Case

CASES: list[Case] = []
