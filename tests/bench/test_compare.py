"""Two sweeps compared: a regression is told from noise."""

from __future__ import annotations

from pathlib import Path

import pytest

from ov_afm.bench.compare import compare
from ov_afm.bench.records import FILE_NAME, read
from ov_afm.errors import ConfigError


def test_compare_tells_a_regression_from_noise(swept: Path) -> None:
    before = [record for record in read(swept / FILE_NAME) if record["option"] == "plain"]
    assert "No figure is worse beyond noise" in compare(before, before)
    after = [dict(record) for record in before]
    for record in after:
        if record["status"] == "ok" and record["device"] == "CPU" and record["prompt_tokens"] == 32:
            record["ttft_ms"] *= 1000
    table = compare(before, after)
    worse = [line for line in table.splitlines() if "**worse**" in line]
    assert [line.split("|")[2].strip() for line in worse] == ["TTFT ms"] * 2
    assert "2 figures are worse" in table


def test_compare_refuses_files_with_nothing_in_common(swept: Path) -> None:
    before = read(swept / FILE_NAME)
    other = [{**record, "model": "another"} for record in before]
    with pytest.raises(ConfigError, match="no measured combination .* in common"):
        compare(before, other)
