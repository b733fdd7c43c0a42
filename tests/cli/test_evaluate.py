"""`ov-afm evaluate`: what it prints, draws and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ov_afm.cli.evaluate import main
from ov_afm.evaluation import scoring


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("a model was loaded")


def test_plot_that_cannot_be_written_is_refused_before_the_work(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scoring, "opened", never)
    assert main([str(tiny_model), "--plot", "kl.gif"]) == 1
    assert capsys.readouterr().err == "ov-afm: error: a plot is written as .svg, .png, .pdf, found 'kl.gif'\n"
    assert main([str(tiny_model), "--plot", str(tmp_path / "no" / "kl.svg")]) == 1
    assert capsys.readouterr().err == f"ov-afm: error: no such folder for the plot: {tmp_path / 'no'}\n"


def test_comparing_compressed_models_alone_needs_a_reference(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--compare", str(tiny_model)]) == 1
    assert capsys.readouterr().err == (
        "ov-afm: error: none of these models is uncompressed; add --reference SOURCE "
        "(an fp16 or fp32 model, or the checkpoint)\n"
    )


@pytest.mark.slow
def test_command_compares_and_draws(
    tiny_model: Path, tiny_fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "size.svg"
    options = ["--reference", str(tiny_fp32), "--tokens", "600", "--block", "200", "--plot", str(plot)]
    assert main(["--compare", str(tiny_model), str(tiny_fp32), *options]) == 0
    said = capsys.readouterr()
    assert [line.split(" ")[1] for line in said.out.splitlines()] == ["model", "---", "tiny-int8", "tiny-fp32"]
    assert "runtime: activations f32, KV cache f32" in said.err
    assert plot.exists()
    assert main([str(tiny_model), *options[:-2], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"][0]
    assert found["model"] == "tiny-int8"
    assert 0 < found["figures"]["kl_mean"]["low"] <= found["figures"]["kl_mean"]["value"]


@pytest.mark.slow
def test_command_says_how_to_get_a_divergence(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_model), "--tokens", "300"]) == 0
    assert "no reference: add --reference SOURCE" in capsys.readouterr().err


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


@pytest.mark.slow
def test_json_has_everything_that_was_asked_for(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny_model), "--long", "--long-tokens", "256", "--tokens", "300", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"][0]
    assert found["long"]["tried"] == 256
    assert len(found["long"]["needles"]) == 3
    assert "speed" not in found
