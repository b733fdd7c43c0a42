"""A GGUF of random weights with the geometry of a model directory, to measure llama.cpp without a checkpoint.

Each matrix has llama.cpp's plain format of as many bits as the IR's: Q4_0 for INT4, Q8_0 for INT8, else F16 or F32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf_format import name_in_gguf, new_writer
from matrices import Matrix

from ov_afm.errors import ConfigError
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.system import console
from ov_afm.system.atomic import replacing

KINDS = {4: "Q4_0", 8: "Q8_0", 16: "F16", 32: "F32"}
SCALE = 0.005


def write_gguf(model: ModelDirectory, matrices: Sequence[Matrix], path: Path, *, vocabulary: bool = False) -> None:
    """Write random weights of a model directory's geometry.

    Args:
        model: The model directory.
        matrices: Its matrices.
        path: New file; appears when it is whole.
        vocabulary: Invent a text for each token, for a program that answers in text.

    Raises:
        ConfigError: llama.cpp has no such model or no such format.
    """
    import gguf

    tensors = _tensors(model, matrices)
    with replacing(path) as temporary:
        writer = new_writer(temporary, model.geometry, model.config)
        _add_tokenizer(writer, model.geometry.vocab if vocabulary else 0)
        for name, size, kind in tensors:
            block, width = gguf.GGML_QUANT_SIZES[kind]
            count = math.prod(size) // block * width
            writer.add_tensor_info(name, _stored(size, block, width, kind), _dtype(kind), count, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with console.Progress() as progress, progress.step("writing GGUF", total=len(tensors)) as advance:
            for seed, (_, size, kind) in enumerate(tensors):
                writer.write_tensor_data(_random(seed, size, kind))
                advance(1)
        writer.close()


def _add_tokenizer(writer: Any, tokens: int) -> None:
    """A text for each of so many tokens, or none at all: token ids go in and come out."""
    import gguf

    if not tokens:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"w{number}" for number in range(tokens)])
    writer.add_token_types([gguf.TokenType.NORMAL] * tokens)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _tensors(model: ModelDirectory, matrices: Sequence[Matrix]) -> list[tuple[str, tuple[int, ...], Any]]:
    import gguf

    formats, name = gguf.GGMLQuantizationType, name_in_gguf(model.geometry)
    norms = ["model.norm.weight"]
    for layer in range(model.geometry.layers):
        norms += [f"model.layers.{layer}.{norm}_layernorm.weight" for norm in ("input", "post_attention")]
    tensors: list[tuple[str, tuple[int, ...], Any]] = [
        (name(norm), (model.geometry.hidden,), formats.F32) for norm in norms
    ]
    for matrix in matrices:
        if matrix.bits not in KINDS:
            raise ConfigError(f"{matrix.name} has {matrix.bits} bits; llama.cpp has {', '.join(map(str, KINDS))}")
        tensors.append((name(matrix.name), matrix.shape, formats[KINDS[matrix.bits]]))
    return tensors


def _stored(size: tuple[int, ...], block: int, width: int, kind: Any) -> tuple[int, ...]:
    """Shape of a tensor as its bytes are held: quantized rows are counted in bytes."""
    if kind.name in ("F32", "F16"):
        return size
    if size[-1] % block:
        raise ConfigError(
            f"rows of {size[-1]} weights cannot be stored as {kind.name}, which takes multiples of {block}"
        )
    return (*size[:-1], size[-1] // block * width)


def _dtype(kind: Any) -> Any:
    import numpy as np

    return np.dtype({"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8))


def _random(seed: int, size: tuple[int, ...], kind: Any) -> Any:
    """Weights of deviation about 0.02; norms are ones."""
    import gguf
    import numpy as np

    if len(size) == 1:
        return np.ones(size, np.float32)
    random = np.random.default_rng(seed)
    if kind.name in ("F16", "F32"):
        return (random.standard_normal(size, np.float32) * 0.02).astype(_dtype(kind))
    block, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.empty((size[0], size[1] // block, width), np.uint8)
    blocks[...] = random.integers(0, 256, blocks.shape, np.uint8)
    # A half-precision scale, then the values: of 4 bits in -8..7, of 8 bits in -127..127.
    scale = SCALE if kind.name == "Q4_0" else SCALE / 16
    blocks[..., :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(size[0], -1)
