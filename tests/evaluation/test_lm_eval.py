"""lm-evaluation-harness on a model directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ov_afm.cli.evaluate import main
from ov_afm.errors import ConfigError
from ov_afm.evaluation.lm_eval import HarnessModel, run_harness
from ov_afm.evaluation.text import Encoder
from ov_afm.model_dir.inference import ir_logits, log_softmax
from ov_afm.system import resources
from ov_afm.system.console import Progress


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    """Two task files with local data: a choice and a generation."""
    folder = tmp_path / "harness"
    folder.mkdir()
    rows = [
        {"question": "The capital of France is", "choices": ["Paris", "a turnip"], "label": 0},
        {"question": "Two and two make", "choices": ["a cathedral of glass", "four"], "label": 1},
        {"question": "Fish live in", "choices": ["water", "spreadsheets"], "label": 0},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        f"task: local_choice\n{data}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: label\ndoc_to_choice: choices\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "words.yaml").write_text(
        f"task: local_words\n{data}output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: '{{choices[label]}}'\ngeneration_kwargs:\n  until: ['.']\n  max_gen_toks: 4\n"
        "metric_list:\n  - metric: exact_match\n"
    )
    return folder


def test_harness_that_is_not_installed_is_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "_installed", lambda name: name != "lm_eval")
    assert main([str(tiny_model), "--harness", "arc_easy"]) == 1
    assert capsys.readouterr().err == ("ov-afm: error: lm_eval not installed; run: pip install 'ov-afm[eval]'\n")


@pytest.mark.slow
def test_harness_runs_local_tasks_offline(smollm2_model: Path, task_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    with Progress() as progress:
        found = run_harness(smollm2_model, ["local_choice", "local_words"], progress, task_dir=task_dir)
    assert found["local_choice"]["acc,none"] == 1.0
    assert 0.0 <= found["local_words"]["exact_match,none"] <= 1.0


@pytest.mark.slow
def test_harness_names_a_task_that_it_does_not_know(tiny_model: Path, task_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    with Progress() as progress, pytest.raises(ConfigError, match="the harness knows no task 'local_none'"):
        run_harness(tiny_model, ["local_none"], progress, task_dir=task_dir)


def test_likelihood_is_that_of_the_distribution(tiny_fp32: Path) -> None:
    model = HarnessModel(tiny_fp32)
    found, greedy = model.likelihood("The quick ", "brown fox")
    encoder = Encoder(tiny_fp32)
    start = encoder.start or encoder("\n")
    before, ids = [*start, *encoder("The quick")], [*start, *encoder("The quick brown fox")]
    log_p = log_softmax(ir_logits(tiny_fp32 / "openvino_model.xml", ids))
    rows = range(len(before) - 1, len(ids) - 1)
    assert found == pytest.approx(sum(float(log_p[row, ids[row + 1]]) for row in rows), abs=1e-3)
    assert greedy == all(log_p[row].argmax() == ids[row + 1] for row in rows)
    whole = model.rolling_likelihood("The quick brown fox")
    assert whole == pytest.approx(found + model.rolling_likelihood("The quick"), abs=1e-3)
