"""What `prune` cannot prune is refused, and nothing is left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import tiny

from ov_afm.errors import CompressionError, ConfigError
from ov_afm.pruning.prune import prune


@pytest.mark.slow
def test_nan_weight_is_named_and_nothing_is_left(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressionError) as caught:
        prune(broken, tmp_path / "out", target_params="100K")
    assert str(caught.value) == (
        "model.layers.1.mlp.up_proj.weight holds weights that are not finite; fetch the checkpoint again"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_model_without_relu2_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    tiny.edit_json(other / "config.json", hidden_act="silu")
    with pytest.raises(CompressionError) as caught:
        prune(other, tmp_path / "out", target_params="100K")
    assert caught.value.code == "not-relu2"
    assert str(caught.value) == "prune takes checkpoints with a ReLU² MLP, found activation silu in other"


def test_negative_minutes_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="^minutes of healing must not be negative, found -1"):
        prune(tiny_checkpoint, tmp_path / "out", target_params="100K", heal_minutes=-1)


@pytest.mark.parametrize("name", ["mlp_bias", "attention_bias"])
def test_biases_are_refused_by_name(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    biased = Path(shutil.copytree(tiny_checkpoint, tmp_path / "biased"))
    tiny.edit_json(biased / "config.json", **{name: True})
    with pytest.raises(CompressionError, match=f"checkpoints without biases, found {name} in biased") as caught:
        prune(biased, tmp_path / "out", target_params="100K")
    assert caught.value.code == "biases"
    assert not (tmp_path / "out").exists()
