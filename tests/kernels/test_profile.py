"""Zeros counted on a real export agree with a direct count in PyTorch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support import tiny

from ov_afm.cli.profile import main
from ov_afm.errors import ConfigError, ExtensionError
from ov_afm.kernels import profile
from ov_afm.model_dir import manifest


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.CORPUS * 3, encoding="utf-8")
    return path


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_zeros_are_those_that_pytorch_counts(model: Path, tiny_checkpoint: Path, text: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    shares: list[float] = []
    for layer in network.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: shares.append(float((args[0] == 0).float().mean()))
        )
    ids = AutoTokenizer.from_pretrained(tiny_checkpoint)(
        text.read_text(encoding="utf-8"), return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        network(ids[:, :64])
    result = profile.profile(model, text, max_tokens=64, window=64)
    assert list(result.zeros) == ["layer 0", "layer 1"]
    # The model is int8, so a neuron close to zero may fall on the other side.
    np.testing.assert_allclose(list(result.zeros.values()), shares, atol=0.02)
    assert result.mean == pytest.approx(np.mean(list(result.zeros.values())), abs=1e-3)


def test_the_predicted_speedup_follows_the_stated_formula(model: Path, text: Path) -> None:
    result = profile.profile(model, text, max_tokens=100, window=30)
    assert result.tokens == 100
    # int8: two down_proj of 64 x 128 with a float16 scale and a uint8 zero point for each of 64 rows
    assert result.down_bytes == 2 * (64 * 128 + 64 * 3)
    saved = result.mean * result.down_bytes
    assert result.speedup == pytest.approx(result.weights_bytes / (result.weights_bytes - saved), abs=2e-3)


def test_the_manifest_gets_the_profile_and_stays_valid(model: Path, text: Path) -> None:
    result = profile.profile(model, text, max_tokens=50)
    record = manifest.verify(model, hashes=True)
    assert record is not None
    assert record.sparsity["profile"]["zeros"] == result.zeros
    assert record.sparsity["profile"]["text_sha256"] == manifest.sha256(text)


def test_json_goes_to_standard_output_alone(model: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--text", str(text), "--max-tokens", "40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 40


@pytest.mark.parametrize(
    "content, message", [(b"", "is empty; give a text file"), (b"\xff\xfe\xfa", "cannot be read as UTF-8 text")]
)
def test_a_text_without_words_is_refused(model: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        profile.profile(model, path)


def test_a_missing_text_is_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(model), "--text", str(tmp_path / "none.txt")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ov-afm: error: ") and error.count("\n") == 1
    assert "none.txt cannot be read as UTF-8 text" in error


def test_numbers_out_of_range_are_named(model: Path, text: Path) -> None:
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, found 0"):
        profile.profile(model, text, max_tokens=0)


def test_a_model_without_relu2_is_refused(model: Path, text: Path) -> None:
    import openvino
    from openvino import opset13 as op

    x = op.parameter([1, 64], np.float32)
    product = op.matmul(op.swish(x), op.constant(np.ones((64, 64), np.float32)), False, True)
    for name in ("openvino_model.xml", "openvino_model.bin", manifest.FILE_NAME):
        (model / name).unlink()
    openvino.save_model(openvino.Model([product], [x]), model / "openvino_model.xml")
    with pytest.raises(ExtensionError, match="has no ReLU² MLP, so it has no zeros to use"):
        profile.profile(model, text)
