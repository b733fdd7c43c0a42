"""Spreads of runs, and numbers for people."""

from __future__ import annotations

import pytest

from ov_afm.bench.statistics import number, spread


def test_spread_of_runs() -> None:
    found = spread([3.0, None, 1.0, 2.0])
    assert found is not None
    assert (found.median, found.least, found.most, found.runs, found.noise) == (2.0, 1.0, 3.0, 3, 1.0)
    assert spread([None]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3e-8, "3e-08"), (0.000123456, "0.000123"), (0.98, "0.980"), (7.389, "7.39"), (2548.4, "2548")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
