"""A GGUF of random weights with the geometry of a model directory, to measure llama.cpp without a checkpoint.

Matrices are Q4_0 with a Q8_0 head for an INT4 model, Q8_0 for INT8, F16 otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ov_afm.errors import ConfigError
from ov_afm.model_dir.geometry import Geometry
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.system import console

SCALE = 0.005


def write_gguf(model: ModelDirectory, path: Path, weight_format: str, *, vocabulary: bool = False) -> None:
    """Write random weights of a model directory's geometry, in llama.cpp's `arcee` layout.

    Args:
        model: The model directory.
        path: New file; appears when it is whole.
        weight_format: The recipe's.
        vocabulary: Invent a text for each token, for a program that answers in text.
    """
    import gguf

    shape = model.geometry
    kinds = gguf.GGMLQuantizationType
    body = {"int4": kinds.Q4_0, "int8": kinds.Q8_0}.get(weight_format, kinds.F16)
    head = kinds.Q8_0 if weight_format in ("int4", "int8") else kinds.F16
    temporary = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(temporary, "arcee")
    _describe(writer, model)
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list([f"w{number}" for number in range(shape.vocab)])
        writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocab)
        writer.add_token_merges(["w 1"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    else:
        # Token ids go in and come out.
        writer.add_tokenizer_model("no_vocab")
    tensors = _tensors(shape, body, head)
    for name, size, kind in tensors:
        block, width = gguf.GGML_QUANT_SIZES[kind]
        count = size[0] * (size[1] if len(size) > 1 else 1) // block * width
        writer.add_tensor_info(name, _stored(size, block, width, kind), _dtype(kind), count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with console.Progress() as progress, progress.step("writing GGUF", total=len(tensors)) as advance:
        for seed, (_, size, kind) in enumerate(tensors):
            writer.write_tensor_data(_random(seed, size, kind))
            advance(1)
    writer.close()
    temporary.replace(path)


def _describe(writer: Any, model: ModelDirectory) -> None:
    shape, config = model.geometry, model.config
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps") or 1e-5))
    writer.add_vocab_size(shape.vocab)


def _tensors(shape: Geometry, body: Any, head: Any) -> list[tuple[str, tuple[int, ...], Any]]:
    import gguf

    hidden, mlp, kind = shape.hidden, shape.intermediate, gguf.GGMLQuantizationType.F32
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors: list[tuple[str, tuple[int, ...], Any]] = [
        ("token_embd.weight", (shape.vocab, hidden), head),
        ("output_norm.weight", (hidden,), kind),
        ("output.weight", (shape.vocab, hidden), head),
    ]
    for layer in range(shape.layers):
        matrices = {
            "attn_q": (wide, hidden),
            "attn_k": (narrow, hidden),
            "attn_v": (narrow, hidden),
            "attn_output": (hidden, wide),
            "ffn_up": (mlp, hidden),
            "ffn_down": (hidden, mlp),
        }
        tensors += [(f"blk.{layer}.{name}.weight", size, body) for name, size in matrices.items()]
        tensors += [(f"blk.{layer}.{name}.weight", (hidden,), kind) for name in ("attn_norm", "ffn_norm")]
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
    if kind.name == "F16":
        return (random.standard_normal(size, np.float32) * 0.02).astype(np.float16)
    block, width = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.empty((size[0], size[1] // block, width), np.uint8)
    blocks[...] = random.integers(0, 256, blocks.shape, np.uint8)
    # A half-precision scale, then the values: of 4 bits in -8..7, of 8 bits in -127..127.
    scale = SCALE if kind.name == "Q4_0" else SCALE / 16
    blocks[..., :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(size[0], -1)
