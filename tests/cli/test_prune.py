"""`ov-afm prune` writes a checkpoint that loads and exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ov_afm.cli.prune import main


@pytest.mark.slow
def test_command_drops_heads_and_the_result_exports(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from ov_afm import Pipeline, export
    from ov_afm.runtime.sampling import Params

    out = tmp_path / "small"
    assert main([str(tiny_checkpoint), "--kv-heads", "1", "-o", str(out), "--num-samples", "8"]) == 0
    report = json.loads((out / "ov_afm_prune.json").read_text())
    assert report["plan"]["reason"] == "1 of 2 KV heads and 2 of 4 query heads in each layer"
    assert [len(each) for each in report["kv_heads_kept"]] == [1, 1]
    assert 0 < report["attention_energy_kept"] < 1
    assert report["energy_kept"] is None
    with Pipeline(export(str(out), tmp_path / "int8", recipe="int8").path) as pipeline:
        assert pipeline.generate("The quick", Params(max_new_tokens=8, ignore_eos=True)).text


@pytest.mark.slow
def test_command_writes_a_checkpoint_that_transformers_loads(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "small"
    words = ["--target-params", "110K", "-o", str(out), "--num-samples", "8", "--heal", "0.02", "--json"]
    curve = tmp_path / "curve.svg"
    assert main([str(tiny_checkpoint), *words, "--plot", str(curve)]) == 0
    assert curve.read_bytes().startswith(b"<?xml")
    curve.unlink()
    report = json.loads(capsys.readouterr().out)
    assert report["plan"]["parameters"] <= 110_000
    assert report["pruned"]["kl_mean"]["value"] > 0
    assert report["healing"]["steps"] >= 1
    assert report["healed"]["perplexity"]["value"] > 1
    assert set(report["prefill_tokens_per_s"]) == {"before", "after"}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.intermediate_size == report["plan"]["intermediate"] == 64
    assert str(model.dtype) == "torch.bfloat16"
    assert (out / "LICENSE").read_text() == (tiny_checkpoint / "LICENSE").read_text()
    assert (out / "chat_template.jinja").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_curve_without_healing_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["none", "-o", str(tmp_path / "out"), "--target-params", "100K", "--plot", "curve.svg"])
    assert caught.value.code == 2
    assert "--plot draws the loss curve of healing; add --heal MINUTES" in capsys.readouterr().err
