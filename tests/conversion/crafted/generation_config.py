"""Forms of `generation_config.json`."""

from __future__ import annotations

from support.crafted import Case

CASES: list[Case] = []
