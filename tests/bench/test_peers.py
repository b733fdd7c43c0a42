"""benchmarks/peers.py: engines take turns on the same geometry."""

from __future__ import annotations

import importlib.machinery
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ov_afm.model_dir import manifest
from ov_afm.model_dir.model_directory import ModelDirectory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for another Python")
def test_peers_take_turns_and_an_absent_one_is_a_row(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    script = Path(manifest.__file__).parents[2] / "benchmarks" / "peers.py"
    few = ["--runs", "2", "--new-tokens", "4", "--prompt-tokens", "32", "--threads", "2"]
    # A Python without site-packages has no llama-cpp-python, whatever this one has.
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    files = ["--gguf", str(tmp_path / "peer.gguf"), "--llama-python", str(bare), "--report", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_model), *few, *files], capture_output=True, text=True, check=True
    )
    assert "ov_afm against openvino-genai, prompt by prompt: decode speed " in done.stdout
    assert "| llama.cpp | not run: llama.cpp ended with status 1: ModuleNotFoundError" in done.stdout
    records = [json.loads(line) for line in (tmp_path / "out" / "peers.jsonl").read_text().splitlines()]
    assert [record["engine"] for record in records] == ["ov_afm", "openvino-genai", "openvino-genai", "ov_afm"]
    assert {record["generated_tokens"] for record in records} == {4}


def test_peer_gguf_has_the_model_s_geometry(tiny_model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    random_gguf = importlib.machinery.SourceFileLoader(
        "random_gguf", str(Path(manifest.__file__).parents[2] / "benchmarks" / "random_gguf.py")
    ).load_module()
    random_gguf.write_gguf(ModelDirectory.open(tiny_model), tmp_path / "peer.gguf", "int4")
    reader = gguf.GGUFReader(tmp_path / "peer.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 8
    assert tensors["blk.1.ffn_up.weight"].shape.tolist() == [64, 128]
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == "Q4_0"
    assert tensors["output.weight"].tensor_type.name == "Q8_0"
    weights = gguf.dequantize(tensors["blk.0.ffn_down.weight"].data, tensors["blk.0.ffn_down.weight"].tensor_type)
    assert 0.015 < weights.std() < 0.03
    assert reader.fields["arcee.attention.head_count_kv"].contents() == 2
