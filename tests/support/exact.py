"""Exact inference on every CPU, for tests that compare words or figures: as properties and as options of a command."""

from __future__ import annotations

from ov_afm.model_dir.inference import EXACT

__all__ = ["EXACT", "EXACT_OPTIONS"]

EXACT_OPTIONS = tuple(word for key, value in EXACT.items() for word in ("--ov-config", f"{key}={value}"))
