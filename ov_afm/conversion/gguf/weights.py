"""A GGUF file becomes a Hugging Face checkpoint: llama and arcee architectures, any quantization of the `gguf` package.

llama.cpp stores the rows of the query and key projections in another order (its rotary embedding turns neighbouring
pairs, Hugging Face's turns halves), writes YaRN into metadata and Llama 3's rope scaling into a tensor, and leaves out
a tied head. All of that is undone here. Weights stream from the mapped file to one safetensors file a few rows at a
time, so memory stays small whatever the model's size. A model that `llama-gguf-split` cut into several files is read
from all of them, whichever of them was named.

Number format of the result: float32, which holds every dequantized value exactly, up to a billion
weights. Above that bfloat16 if that is what the matrices of the file are, otherwise float16: its
rounding (2^-11) is far below the steps of any quantized GGUF format.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError
from ...system.atomic import write_json, write_text
from ...system.console import human_bytes
from ...system.paths import cache_dir, cached
from ..checkpoint import safetensors_header
from .config import ARCHITECTURES, ROPE_FREQS, check_numbers, config_of, need
from .tokenizer import with_defaults, write_tokenizer

__all__ = ["convert", "convert_cached", "model_name", "parts"]

CONVERSION = 3  # Counts up when the result changes, so that older cache entries are not used.
EXACT_UP_TO = 1_000_000_000
CHUNK = 1 << 22  # weights dequantized at once

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# ArceeForCausalLM's MLP has no gate.
UNGATED = {"arcee": ("ffn_gate",)}

# `model-00002-of-00003.gguf` (SPLIT_PREFIX_FORMAT, src/llama.cpp in ggml-org/llama.cpp).
PART_NAME = re.compile(r"(?P<model>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)

OnBytes = Callable[[int, int], None]


def parts(path: Path) -> tuple[Path, ...]:
    """The files of a model, of which `path` is one.

    Raises:
        SourceError: One is missing.
    """
    name = PART_NAME.fullmatch(path.name)
    if name is None:
        return (path,)
    model, count, suffix = name["model"], name["count"], name["suffix"]
    files = tuple(path.with_name(f"{model}-{number:05d}-of-{count}{suffix}") for number in range(1, int(count) + 1))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise SourceError(
            f"{missing[0]} is missing beside {path.name} ({len(missing)} of {len(files)} parts of the model are); "
            "fetch them all into one folder",
            code="gguf-incomplete",
        )
    return files or (path,)


def model_name(path: Path) -> str:
    """The file's name, without the number of a part."""
    name = PART_NAME.fullmatch(path.name)
    return path.name if name is None else name["model"] + name["suffix"]


def convert_cached(path: Path, digests: Sequence[str], on_bytes: OnBytes = lambda *_: None) -> Path:
    """`convert` into the cache, or what an earlier call left there.

    Args:
        path: The GGUF file, or one of its parts.
        digests: sha256 of each part. Nothing less will do: a file of the same size and time may hold other weights.
        on_bytes: Gets the size of each piece written, and of the whole.

    Returns:
        The checkpoint folder.

    Raises:
        SourceError: See `convert`.
    """
    key = f"{CONVERSION}|{'|'.join(digests)}"
    folder = cache_dir() / "gguf" / f"{Path(model_name(path)).stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with cached(folder) as work:
            convert(path, work, on_bytes)
    return folder


def convert(path: Path, folder: Path, on_bytes: OnBytes = lambda *_: None) -> None:
    """Write config.json, generation_config.json, tokenizer files, model.safetensors and a card that names the licence.

    Args:
        path: The GGUF file, or one of its parts.
        folder: An existing folder.
        on_bytes: Gets the size of each piece written, and of the whole.

    Raises:
        SourceError: The file is no GGUF, is cut short, or holds something that is not supported; or the
            disk or the `gguf` package is missing what this needs.
    """
    fields, tensors = _read(path)
    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise SourceError(
            f"GGUF architecture {arch!r} of {path.name} is not supported; supported are {', '.join(ARCHITECTURES)}",
            code="architecture-unsupported",
        )
    check_numbers(path.name, arch, fields)
    weights = _renamed(path.name, arch, tensors, fields)
    config = config_of(path.name, arch, fields, tensors)
    write_tokenizer(folder, fields, path.name, config["max_position_embeddings"])
    count = sum(int(tensor.n_elements) for tensor in weights.values())
    dtype = _dtype(count, weights.values())
    needed, free = count * (4 if dtype == "float32" else 2), shutil.disk_usage(folder).free
    if needed > free:
        raise SourceError(
            f"converting {path.name} needs {human_bytes(needed)} in {cache_dir()}, {human_bytes(free)} are free; "
            "free some space, or set OV_AFM_CACHE to a folder on a larger disk",
            code="disk-full",
        )
    _check_shapes(path.name, weights, config)
    _write_weights(folder / "model.safetensors", weights, config, dtype, lambda size: on_bytes(size, needed))
    license_id = fields.get("general.license")
    if license_id:
        write_text(folder / "README.md", f"---\nlicense: {license_id}\n---\nConverted from {path.name}.\n")
    config["dtype"] = dtype
    write_json(folder / "config.json", config)
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors of a model, of all its parts."""
    files = parts(path)
    fields: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for index, file in enumerate(files):
        own, found = _read_file(file)
        fields = fields or own
        count, number = own.get("split.count", 1), own.get("split.no", 0)
        if not (isinstance(count, int) and isinstance(number, int)):
            raise SourceError(f"split.count of {file.name} is {count!r}; fetch the file again", code="gguf-split")
        if max(count, 1) != len(files) or number != index:
            raise SourceError(
                f"{file.name} says that it is part {number + 1} of {count}, and its name says another; give the parts "
                "the names that llama-gguf-split gave them, NAME-00001-of-00003.gguf and so on",
                code="gguf-split",
            )
        twice = tensors.keys() & found
        if twice:
            raise SourceError(f"{file.name} has {min(twice)} a second time; fetch the parts again", code="gguf-split")
        tensors.update(found)
    expected = fields.get("split.tensors.count", len(tensors))
    if len(files) > 1 and expected != len(tensors):
        raise SourceError(
            f"the {len(files)} parts of {model_name(path)} hold {len(tensors)} of {expected} tensors; fetch them again",
            code="gguf-split",
        )
    return with_defaults(fields), tensors


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise SourceError(
            "reading GGUF files needs the gguf package; run: pip install 'ov-afm[export]'", code="not-installed"
        ) from error
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise SourceError(f"{path} is no GGUF file: it starts with {magic!r}; fetch it again", code="gguf-damaged")
    try:
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise SourceError(
            f"{path} is cut short or damaged ({path.stat().st_size} bytes); fetch it again", code="gguf-damaged"
        ) from error
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def _renamed(file: str, arch: str, tensors: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of the file by their Hugging Face names; every one must be known, none may be missing."""
    left_out = UNGATED.get(arch, ())
    names = {
        f"blk.{layer}.{ours}.weight": f"model.layers.{layer}.{theirs}.weight"
        for layer in range(need(fields, f"{arch}.block_count", file))
        for ours, theirs in LAYER.items()
        if ours not in left_out
    }
    names.update(OUTER)
    missing = [name for name in names if name not in tensors and name != "output.weight"]
    unknown = [name for name in tensors if name not in names and name != ROPE_FREQS]
    if missing or unknown:
        problem = f"lacks tensor {missing[0]}" if missing else f"has tensor {unknown[0]}, which has no place in {arch}"
        raise SourceError(f"{file} {problem}; use the safetensors model", code="gguf-tensors")
    return {names[name]: tensor for name, tensor in tensors.items() if name in names}


def _check_shapes(file: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse tensors whose sizes are not those that the metadata names."""
    hidden, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
    }
    for name, tensor in tensors.items():
        found = tuple(int(size) for size in reversed(tensor.shape))
        expected = shapes.get(name.split(".")[-2], (hidden,))
        if found != expected:
            raise SourceError(
                f"{tensor.name} of {file} has sizes {found}, and its metadata says {expected}; fetch the file again",
                code="gguf-tensors",
            )


def _dtype(count: int, tensors: Iterable[Any]) -> str:
    if count <= EXACT_UP_TO:
        return "float32"
    matrices = {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1}
    return "bfloat16" if matrices == {"BF16"} else "float16"


def _write_weights(
    path: Path, tensors: Mapping[str, Any], config: Mapping[str, Any], dtype: str, advance: Callable[[int], None]
) -> None:
    """One safetensors file, written as it is dequantized."""
    stored = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    shapes = {name: (stored, [int(size) for size in reversed(tensor.shape)]) for name, tensor in tensors.items()}
    with path.open("wb") as stream:
        stream.write(safetensors_header(shapes))
        for name, tensor in tensors.items():
            for block in _rows(name, tensor, config):
                values = _encoded(block, dtype)
                stream.write(values.data)
                advance(values.nbytes)


def _rows(name: str, tensor: Any, config: Mapping[str, Any]) -> Iterator[NDArray[np.float32]]:
    """The tensor's rows as float32, in Hugging Face's order, some at a time."""
    from gguf.quants import dequantize

    data = tensor.data
    order = None
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        # Row 2i of a head is Hugging Face's row i, row 2i+1 its row i + head_dim/2
        # (LlamaModel.permute, conversion/llama.py in ggml-org/llama.cpp; ArceeModel inherits it).
        order = np.arange(len(data)).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    step = max(1, CHUNK // max(1, int(tensor.n_elements) // len(data)))
    for start in range(0, len(data), step):
        rows = data[start : start + step] if order is None else data[order[start : start + step]]
        try:
            yield dequantize(rows, tensor.tensor_type)
        except NotImplementedError as error:
            raise SourceError(
                f"quantization {tensor.tensor_type.name} of {tensor.name} is not supported; use another GGUF file",
                code="gguf-quantization-unsupported",
            ) from error


def _encoded(block: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Values in the number format of the result."""
    values: NDArray[Any] = np.ascontiguousarray(block, np.float32)
    if dtype == "float16":
        values = values.astype(np.float16)
        if not np.isfinite(values).all():
            raise SourceError("a weight of the GGUF file is beyond what float16 holds; use the safetensors model")
    elif dtype == "bfloat16":
        # What is bfloat16 in the file has nothing in its lower half; the rest is rounded to nearest, ties to even.
        bits = values.view(np.uint32)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values
