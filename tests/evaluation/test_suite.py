"""The card: quality, tasks, speed and energy of several models."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from ov_afm.bench.plan import Settings
from ov_afm.cli.evaluate import main
from ov_afm.evaluation import scoring, suite, table
from ov_afm.evaluation.fidelity import compare
from ov_afm.evaluation.speed import Speed, measure_speed
from ov_afm.evaluation.tasks import Result, wilson
from ov_afm.evaluation.text import load_text

SPEED = Speed(10.0, 500.0, 3e9, None, "not available: no counter here")


@pytest.mark.slow
def test_card_has_a_column_for_each_model_and_says_why_energy_is_missing(tiny_model: Path, tiny_fp32: Path) -> None:
    fidelity = compare([tiny_model, tiny_fp32], tiny_fp32, load_text(tokens=600))
    results = [
        suite.SuiteResult(tasks=[Result("code", 5, 20, wilson(5, 20), {})], speed=SPEED),
        suite.SuiteResult(tasks=[Result("code", 20, 20, wilson(20, 20), {})]),
    ]
    text = table.card(fidelity, results)
    assert text.splitlines()[0] == "|  | tiny-int8 | tiny-fp32 |"
    assert "| code accuracy | 5 of 20, 25% (11%–47%) | 20 of 20, 100% (84%–100%) |" in text
    assert "| decode, tokens/s | 10.0 | – |" in text
    assert "| energy, J/token | no counter | – |" in text
    assert table.card_notes(results) == ["energy: not available: no counter here"]


@pytest.mark.slow
def test_card_measures_all_of_it(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Settings(devices=("CPU",), prompt_tokens=(32,), new_tokens=4, runs=1)
    monkeypatch.setattr(suite, "measure_speed", functools.partial(measure_speed, settings=short))
    tasks = tmp_path / "one.jsonl"
    tasks.write_text(json.dumps({"id": "1", "kind": "math", "prompt": "1?", "answer": 1}))
    assert main([str(tiny_model), "--suite", "card", "--tasks", str(tasks), "--tokens", "300"]) == 0
    said = capsys.readouterr()
    rows = dict(line.strip("| ").split(" | ", 1) for line in said.out.splitlines()[2:])
    assert rows["one accuracy"].startswith(("0 of 1", "1 of 1"))
    assert float(rows["decode, tokens/s"]) > 0
    assert "energy: " in said.err


@pytest.mark.slow
def test_peer_of_another_tokenizer_is_measured_without_divergence(
    tiny_model: Path, tiny_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scoring.Encoder

    def other(model: Path) -> Any:
        encoder = real(model)
        return encoder if model == tiny_model else lambda text: [*encoder(text), 1]

    monkeypatch.setattr(scoring, "Encoder", other)
    with pytest.raises(scoring.OtherTokenizer):
        compare([tiny_model], tiny_fp32, load_text(tokens=300))
    found = compare([tiny_model], tiny_fp32, load_text(tokens=300), peers=True)[0]
    assert found.reference is None
    assert found.figures.kl_mean is None
    assert found.bits_per_byte > 0
