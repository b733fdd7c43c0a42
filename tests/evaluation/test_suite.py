"""Long context, card and harness: what `ov-afm evaluate` says beyond one text."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ov_afm.bench.plan import Settings
from ov_afm.cli.evaluate import main
from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.evaluation import long_context, scoring, suite, table
from ov_afm.evaluation.fidelity import compare
from ov_afm.evaluation.lm_eval import HarnessModel, run_harness
from ov_afm.evaluation.speed import Speed, measure_speed
from ov_afm.evaluation.tasks import Result, wilson
from ov_afm.evaluation.text import Encoder, load_text
from ov_afm.model_dir.inference import ir_logits, log_softmax
from ov_afm.system import resources
from ov_afm.system.console import Progress


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def along(model: Path, max_tokens: int | None) -> long_context.LongContext:
    with Progress() as progress:
        return long_context.long_context(model, load_text(), progress, max_tokens=max_tokens)


def test_perplexity_by_position_is_that_of_one_long_passage(tiny_fp32: Path) -> None:
    found = along(tiny_fp32, 600)
    ids = Encoder(tiny_fp32)(load_text().content)[:600]
    log_p = log_softmax(ir_logits(tiny_fp32 / "openvino_model.xml", ids))[:-1]
    nll = -log_p[np.arange(599), ids[1:]]
    expected = [(first, end, math.exp(nll[first:end].mean())) for first, end in ((0, 128), (128, 256), (256, 512))]
    assert found.perplexity[:3] == tuple((first, end, pytest.approx(value, rel=1e-3)) for first, end, value in expected)
    assert found.perplexity[3][:2] == (512, 599)
    assert (found.context, found.tried) == (2560, 600)


def test_needles_are_asked_at_every_length_and_depth_and_kept(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = along(tiny_model, 600)
    assert [(each.tokens, each.depth) for each in found.needles] == [
        (length, depth) for length in (256, 512, 600) for depth in long_context.DEPTHS
    ]
    # Random weights find nothing.
    assert not any(each.found for each in found.needles)
    monkeypatch.setattr(long_context, "IrModel", lambda *_, **__: pytest.fail("the model was loaded"))
    assert along(tiny_model, 600) == found


@pytest.mark.slow
def test_real_model_finds_the_needle(smollm2_model: Path) -> None:
    found = along(smollm2_model, 256)
    assert [each.found for each in found.needles] == [True, True, True]
    assert "| 256 | found" in long_context.markdown(found)


@pytest.mark.parametrize("tokens", [100, 2561])
def test_length_outside_the_context_is_refused(tiny_model: Path, tokens: int) -> None:
    with pytest.raises(ConfigError) as caught:
        along(tiny_model, tokens)
    assert caught.value.code == "long-tokens"
    assert str(caught.value) == (
        f"the longest prompt must lie between 256 and the model's context of 2560, found {tokens}"
    )


def test_cache_that_does_not_fit_in_memory_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda: 1000)
    with pytest.raises(OVAFMError, match="a prompt of 2560 tokens at f32 needs about 1.00 GB of memory"):
        along(tiny_model, None)


SPEED = Speed(10.0, 500.0, 3e9, None, "not available: no counter here")


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


# -- The harness


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


# -- The command


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--long-tokens", "300"], "--long-tokens needs --long"),
        (["--task-dir", "x"], "--task-dir needs --harness"),
        ([], "at least one model directory is needed"),
    ],
)
def test_options_without_their_partner_are_refused(
    options: list[str], said: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*options, *([str(tiny_model)] if options else [])])
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_unknown_tasks_are_refused_before_any_work(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_model), "--tasks", "physics"]) == 1
    assert capsys.readouterr().err == ("ov-afm: error: no tasks 'physics': give code, math or a readable .jsonl file\n")


def test_json_has_everything_that_was_asked_for(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_model), "--long", "--long-tokens", "256", "--tokens", "300", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"][0]
    assert found["long"]["tried"] == 256
    assert len(found["long"]["needles"]) == 3
    assert "speed" not in found
