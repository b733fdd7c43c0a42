"""Prompts of an exact length that share no beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ov_afm.bench.prompts import Prompts


@pytest.mark.parametrize("kind", ["text", "random"])
def test_prompts_have_the_length_asked_for_and_no_common_beginning(tiny_model: Path, kind: Any) -> None:
    prompts = Prompts(tiny_model, kind)
    made = [prompts.make(length) for length in (1, 8, 64, 64, 64, 300, 300)]
    assert [len(each) for each in made] == [1, 8, 64, 64, 64, 300, 300]
    # The engine reuses whole blocks of 16 tokens or more (32 on CPU).
    assert len({tuple(each[:16]) for each in made[2:]}) == 5
    assert all(2 < token < 512 for each in made for token in each)
