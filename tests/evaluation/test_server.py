"""Tasks for a server instead of a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ov_afm.cli.evaluate import main


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"id": str(n), "kind": "math", "prompt": f"{n} + 1?", "answer": n + 1} for n in range(4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_server_is_asked_the_same_tasks(
    tiny_model: Path, sums: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import serving

    monkeypatch.setattr("ov_afm.evaluation.server.MAX_NEW_TOKENS", 8)
    with serving.server(tiny_model) as server:
        assert main(["--server", f"{server.url}/v1", "--tasks", str(sums), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "tiny-int8"
    assert found["tasks"][0]["total"] == 4


def test_server_that_is_not_there_is_told(sums: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--server", "http://127.0.0.1:9/v1", "--tasks", str(sums)]) == 1
    assert capsys.readouterr().err == (
        "ov-afm: error: http://127.0.0.1:9/v1/models does not answer ([Errno 111] Connection refused); "
        "start the server first, ours with: ov-afm serve DIR\n"
    )
    assert main(["--server", "localhost:8000", "--tasks", str(sums)]) == 1
    assert capsys.readouterr().err == (
        "ov-afm: error: --server takes an address such as http://127.0.0.1:8000/v1, found 'localhost:8000'\n"
    )


def test_server_shows_no_distributions(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--server", "http://127.0.0.1:9/v1", str(tiny_model)])
    assert caught.value.code == 2
    assert "--server takes --tasks and --json alone" in capsys.readouterr().err
