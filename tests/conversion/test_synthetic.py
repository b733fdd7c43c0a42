"""Synthetic checkpoints have the real shape, are marked as such, and are the same bytes for the same seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ov_afm.cli.synth import main
from ov_afm.conversion.sources import resolve
from ov_afm.conversion.synthetic import DEVIATION, GEOMETRIES, synth
from ov_afm.errors import ConfigError


def test_afm_has_its_published_size() -> None:
    assert GEOMETRIES["afm-4.5b"].all_parameters == pytest.approx(4.62e9, rel=0.005)


def test_checkpoint_is_what_transformers_reads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = synth("tiny", tmp_path / "model")
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model).__name__ == "ArceeForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) == GEOMETRIES["tiny"].all_parameters
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert float(weight.float().std()) == pytest.approx(DEVIATION, rel=0.05)
    assert float(model.model.norm.weight.float().min()) == 1.0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == GEOMETRIES["tiny"].vocab
    text = "Grüße, 你好 🙂\n\tdef f(): pass"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_mark_follows_it(tmp_path: Path) -> None:
    source = resolve(synth("tiny", tmp_path / "model"))
    assert source.synthetic
    assert source.describe()["synthetic"] is True
    assert source.license == "apache-2.0"


def test_same_seed_same_bytes_and_shards_hold_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = synth("tiny", tmp_path / "one"), synth("tiny", tmp_path / "two")
    other = synth("tiny", tmp_path / "other", seed=1)
    name = "model-00001-of-00001.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    assert (one / name).read_bytes() != (other / name).read_bytes()
    monkeypatch.setattr("ov_afm.conversion.synthetic.SHARD_BYTES", 300_000)
    cut = synth("tiny", tmp_path / "cut")
    shards = sorted(cut.glob("*.safetensors"))
    assert len(shards) > 1
    assert len(resolve(cut).weights) == len(shards)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * GEOMETRIES["tiny"].all_parameters


def test_layers_change_the_depth_only(tmp_path: Path) -> None:
    config = json.loads((synth("tiny", tmp_path / "model", layers=1) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (1, GEOMETRIES["tiny"].hidden)


def test_bad_values_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^geometry 'huge' is unknown; choose one of afm-4\.5b, "):
        synth("huge", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"^a model has at least 1 layer, found 0$"):
        synth("tiny", tmp_path / "model", layers=0)
    assert list(tmp_path.iterdir()) == []


def test_command_prints_the_folder_and_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--geometry", "tiny", "--output", str(tmp_path / "model")]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    assert main(arguments) == 1
    assert capsys.readouterr().err == (
        f"ov-afm: error: {tmp_path / 'model'} is not empty; choose another output directory, "
        "or replace it with --force\n"
    )
