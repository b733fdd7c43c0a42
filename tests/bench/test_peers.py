"""benchmarks/peers.py: engines take turns on the same geometry, in the same format."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import benchmarks

from ov_afm.errors import ConfigError
from ov_afm.model_dir.model_directory import ModelDirectory

gguf_format, matrices_of = benchmarks.load("gguf_format"), benchmarks.load("matrices")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for another Python")
def test_peers_take_turns_and_an_absent_one_is_a_row(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    few = ["--runs", "2", "--new-tokens", "4", "--prompt-tokens", "32", "--threads", "2"]
    # A Python without site-packages has no llama-cpp-python, whatever this one has.
    bare = tmp_path / "bare-python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    files = ["--gguf", str(tmp_path / "peer.gguf"), "--llama-python", str(bare), "--report", str(tmp_path / "out")]
    # Without a manifest, the IR alone says that this is INT8.
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "ov_afm.json").unlink()
    done = subprocess.run(
        [sys.executable, benchmarks.FOLDER / "peers.py", model, *few, *files, "--record", tmp_path / "figures"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "ov_afm against openvino-genai, prompt by prompt: decode speed " in done.stdout
    assert "| llama.cpp | not run: llama.cpp ended with status 1: ModuleNotFoundError" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "peers.jsonl").read_text().splitlines()]
    assert [row["engine"] for row in rows] == ["ov_afm", "openvino-genai", "openvino-genai", "ov_afm"]
    assert {row["generated_tokens"] for row in rows} == {4}
    assert all(row["weights"].startswith("INT8 per row, ") for row in rows)
    (record,) = benchmarks.load("records").read(tmp_path / "figures")
    assert [(each.kind, each.peer) for each in record.figures] == [
        ("decode", "OpenVINO GenAI"),
        ("prefill", "OpenVINO GenAI"),
    ]
    assert record.command.startswith("python benchmarks/peers.py model --runs 2")
    assert str(tmp_path) not in json.dumps(record.model) + record.command
    assert record.model["weights"] == "INT8 per row"


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0"), (16, "F16")])
def test_peer_gguf_has_the_model_s_geometry_and_bits(tiny_model: Path, tmp_path: Path, bits: int, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    model = ModelDirectory.open(tiny_model)
    matrices = [
        each if "mlp" not in each.name else replace(each, bits=bits) for each in matrices_of.read_matrices(model.xml)
    ]
    benchmarks.load("random_gguf").write_gguf(model, matrices, tmp_path / "peer.gguf")
    reader = gguf.GGUFReader(tmp_path / "peer.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 8
    assert tensors["blk.1.ffn_up.weight"].shape.tolist() == [64, 128]
    assert tensors["blk.1.ffn_up.weight"].tensor_type.name == kind
    assert tensors["output.weight"].tensor_type.name == "Q8_0"
    weights = gguf.dequantize(tensors["blk.0.ffn_down.weight"].data, tensors["blk.0.ffn_down.weight"].tensor_type)
    assert 0.015 < weights.std() < 0.03
    assert reader.fields["arcee.attention.head_count_kv"].contents() == 2


def write(model: ModelDirectory, matrices: Any, path: Path) -> Path:
    benchmarks.load("random_gguf").write_gguf(model, matrices, path)
    return path


def test_a_gguf_that_is_no_peer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = ModelDirectory.open(tiny_model)
    matrices = matrices_of.read_matrices(model.xml)
    read = gguf_format.read_peer

    good = read(write(model, matrices, tmp_path / "good.gguf"), model.geometry, matrices)
    assert matrices_of.kinds(good) == "Q8_0"
    assert matrices_of.bits_per_weight(good) == 8.5

    for bits in (4, 16):
        other = write(model, [replace(each, bits=bits) for each in matrices], tmp_path / f"{bits}.gguf")
        with pytest.raises(ConfigError, match="weights of .* bits, the model's 8.35 bits"):
            read(other, model.geometry, matrices)
    wider = [replace(each, shape=(192, 64)) if "up_proj" in each.name else each for each in matrices]
    with pytest.raises(ConfigError, match="blk.0.ffn_up.weight 192 x 64, the model's 128 x 64"):
        read(write(model, wider, tmp_path / "wide.gguf"), model.geometry, matrices)
    untied = [each for each in matrices if "lm_head" not in each.name]
    with pytest.raises(ConfigError, match="output.weight 512 x 64, the model's absent"):
        read(tmp_path / "good.gguf", model.geometry, untied)
    with pytest.raises(ConfigError, match="heads 4, 2 of them KV"):
        read(tmp_path / "good.gguf", replace(model.geometry, heads=8, head_dim=8), matrices)
    (tmp_path / "text.gguf").write_text("no GGUF")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "text.gguf", model.geometry, matrices)


def test_a_model_that_llama_cpp_does_not_have_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    model = ModelDirectory.open(tiny_model)
    other = replace(model, geometry=replace(model.geometry, architecture="OtherForCausalLM"))
    with pytest.raises(ConfigError, match="OtherForCausalLM"):
        write(other, matrices_of.read_matrices(model.xml), tmp_path / "peer.gguf")
    assert list(tmp_path.iterdir()) == []


def test_matrices_are_described_as_the_ir_stores_them(tmp_path: Path) -> None:
    import openvino
    from openvino import opset13 as ops

    def compressed(kind: str, shape: list[int], rows: int) -> Any:
        codes = ops.constant(openvino.Tensor(getattr(openvino.Type, kind), shape))
        scale = ops.constant(np.ones([*shape[:-1], 1], np.float16))
        scaled = ops.multiply(ops.convert(codes, "f16"), scale)
        return ops.convert(ops.reshape(scaled, np.array([rows, -1]), special_zero=False), "f32")

    def matmul(x: Any, weights: Any, name: str) -> Any:
        node = ops.matmul(x, weights, transpose_a=False, transpose_b=True)
        node.set_friendly_name(name)
        return node

    ids = ops.parameter([1, -1], np.int64)
    table = compressed("u8", [64, 32], 64)
    embedded = ops.gather(table, ids, np.int64(0))
    embedded.set_friendly_name("model.embed_tokens/Gather")
    up = matmul(embedded, compressed("i4", [96, 2, 16], 96), "model.layers.0.mlp.up_proj/MatMul")
    down = matmul(up, ops.constant(np.ones((32, 96), np.float32)), "model.layers.0.mlp.down_proj/MatMul")
    head = matmul(down, table, "lm_head/MatMul")
    openvino.save_model(openvino.Model([head], [ids]), tmp_path / "tied.xml", compress_to_fp16=False)
    found = {each.name: (each.shape, each.bits, each.kind) for each in matrices_of.read_matrices(tmp_path / "tied.xml")}
    assert found == {
        "model.embed_tokens.weight": ((64, 32), 8, "INT8 per row"),
        "model.layers.0.mlp.up_proj.weight": ((96, 32), 4, "INT4 g16"),
        "model.layers.0.mlp.down_proj.weight": ((32, 96), 32, "F32"),
    }
    stored = {each.name: each.stored_bytes for each in matrices_of.read_matrices(tmp_path / "tied.xml")}
    assert stored["model.layers.0.mlp.up_proj.weight"] == 96 * 32 // 2 + 96 * 2 * 2

    strange = matmul(embedded, ops.constant(np.ones((8, 32), np.float32)), "adapter/MatMul")
    openvino.save_model(openvino.Model([strange], [ids]), tmp_path / "strange.xml", compress_to_fp16=False)
    with pytest.raises(ConfigError, match="adapter/MatMul"):
        matrices_of.read_matrices(tmp_path / "strange.xml")
