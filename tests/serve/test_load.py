"""The program that puts a server under load, with small numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import benchmarks


@pytest.mark.slow
def test_every_request_ends_whatever_clients_and_engine_do(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"streams": 16, "leavers": 5, "requests": 80, "hang-ups": 20, "kills": 1, "new-tokens": 60}
    words = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    benchmarks.run("serve_load", tiny_model, *words, "--record", tmp_path, monkeypatch=monkeypatch)
    (record,) = benchmarks.load("records").read(tmp_path)
    # So few requests do not show whether memory grows, and the machine has more to do than to answer /health.
    uncertain = ("MB of the", "/health beside")
    assert not [check for check in record.checks if not check.holds and not check.what.startswith(uncertain)]
    table = capsys.readouterr().out
    for shown in (record.cpu["name"], "20 hang-ups in a row", "1 kills: requests without answer or error"):
        assert shown in table


def test_missing_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmarks.run("serve_load", tmp_path / "none", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err.startswith("ov-afm: error: no such model directory")
