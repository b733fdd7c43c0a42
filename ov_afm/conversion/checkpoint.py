"""Looking at a Hugging Face checkpoint folder before anything heavy is loaded from it.

What would fail ten minutes into an export is found here in milliseconds, from JSON files, headers and file lengths:
without torch or transformers, and without running code or pickles of the checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import SourceError

__all__ = [
    "SUPPORTED",
    "check_config",
    "check_tokenizer",
    "find_weights",
    "license_files",
    "license_in_card",
    "read_json",
    "safetensors_header",
]

# What the tests export, run and compare with transformers.
SUPPORTED = ("ArceeForCausalLM", "LlamaForCausalLM")

LICENSE_NAMES = re.compile(r"(licen[cs]e|notice|copying|use_policy|acceptable_use)", re.IGNORECASE)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SourceError: It is not JSON, or not an object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SourceError(
            f"{path} cannot be read as JSON ({error}); fetch the file again", code="json-unreadable"
        ) from error
    if not isinstance(fields, dict):
        raise SourceError(
            f"{path} holds a JSON {type(fields).__name__} where an object is needed; fetch the file again",
            code="json-no-object",
        )
    return fields


def check_config(config: Mapping[str, Any], where: str, *, trust_remote_code: bool = False) -> None:
    """Refuse a configuration that no export could serve.

    Args:
        config: Contents of `config.json`.
        where: What to call the model in messages.
        trust_remote_code: Allow `auto_map`, that is Python code that comes with the checkpoint.

    Raises:
        SourceError: The architecture is not supported, or the weights are quantized already.
    """
    if "auto_map" in config and not trust_remote_code:
        raise _remote_code(where, "config.json")
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise SourceError(
            f"config.json of {where} names no architecture; supported are {', '.join(SUPPORTED)}",
            code="architecture-missing",
        )
    if architectures[0] not in SUPPORTED:
        raise SourceError(
            f"architecture {architectures[0]} of {where} is not supported; supported are {', '.join(SUPPORTED)}",
            code="architecture-unsupported",
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise SourceError(
            f"weights of {where} are quantized already ({method}); start from the bf16, fp16 or fp32 checkpoint",
            code="weights-quantized",
        )


def check_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a folder without a tokenizer, or with one that brings its own code.

    Raises:
        SourceError: As above.
    """
    sufficient = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
    if not any(all((folder / name).is_file() for name in names) for names in sufficient):
        raise SourceError(
            f"no tokenizer in {folder}: tokenizer.json is missing; copy the tokenizer files of the model there",
            code="tokenizer-missing",
        )
    config = folder / "tokenizer_config.json"
    if config.exists() and "auto_map" in read_json(config) and not trust_remote_code:
        raise _remote_code(str(folder), config.name)


def _remote_code(where: str, file: str) -> SourceError:
    return SourceError(
        f"{file} of {where} asks to run Python code that comes with the model (auto_map); "
        "read that code, then add --trust-remote-code",
        code="remote-code",
    )


def find_weights(folder: Path, *, allow_pickle: bool = False) -> tuple[Path, ...]:
    """The weight files of a checkpoint, each checked to be whole.

    Args:
        folder: The checkpoint.
        allow_pickle: Accept `.bin` files where there are no safetensors. Unpickling runs code.

    Raises:
        SourceError: There are none, one is missing or damaged, or only pickles exist and are not allowed.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.exists():
        return _shards(folder, index)
    if single.exists():
        check_safetensors(single)
        return (single,)
    if (folder / "adapter_config.json").exists():
        raise SourceError(
            f"{folder} is a LoRA adapter, not a model; merge it into its base model (peft: merge_and_unload) first",
            code="source-is-adapter",
        )
    pickles = sorted(path for pattern in PICKLES for path in folder.glob(pattern) if path.name != "training_args.bin")
    if pickles and not allow_pickle:
        raise SourceError(
            f"{folder} has only pickled weights ({pickles[0].name}), and loading a pickle runs whatever code is in it; "
            "use a safetensors checkpoint, or add --allow-pickle if you trust its author",
            code="weights-pickled",
        )
    if not pickles:
        raise SourceError(
            f"no weights in {folder}: neither model.safetensors nor model.safetensors.index.json is there",
            code="weights-missing",
        )
    return tuple(pickles)


def _shards(folder: Path, index: Path) -> tuple[Path, ...]:
    tensors = read_json(index).get("weight_map")
    if not isinstance(tensors, dict) or not tensors:
        raise SourceError(f"{index} has no weight_map; fetch the file again", code="weights-index-damaged")
    names = sorted(set(map(str, tensors.values())))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise SourceError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} weight files are missing); fetch them again",
            code="weights-incomplete",
        )
    tensors_of = {name: check_safetensors(folder / name) for name in names}
    for tensor, name in tensors.items():
        if tensor not in tensors_of[name]:
            raise SourceError(
                f"{folder / name} does not hold {tensor}, which {index.name} says it does; fetch both again",
                code="weights-index-damaged",
            )
    return tuple(folder / name for name in names)


def check_safetensors(path: Path) -> frozenset[str]:
    """Names of the tensors in a safetensors file whose length fits its header.

    Raises:
        SourceError: The header is damaged, or the file is shorter or longer than the header says.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise SourceError(
            f"{path} is damaged or cut short ({size} bytes; {error}); fetch it again", code="weights-damaged"
        ) from error


def safetensors_header(tensors: Mapping[str, tuple[str, Sequence[int]]]) -> bytes:
    """What a safetensors file begins with; the values of its tensors follow in the same order.

    The library itself only writes tensors that are all in memory. Format:
    https://github.com/huggingface/safetensors#format

    Args:
        tensors: Type (`F32`, `F16`, `BF16`) and shape by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def license_files(folder: Path) -> tuple[Path, ...]:
    """Files at the top of a folder that carry terms: LICENSE, NOTICE, USE_POLICY and their like."""
    return tuple(sorted(path for path in folder.iterdir() if path.is_file() and LICENSE_NAMES.match(path.name)))


def license_in_card(folder: Path) -> str | None:
    """The licence identifier in the front matter of a folder's README.md; None where there is none."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    if not front:
        return None
    keys = dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([^\"'\r\n#]+?)[\"']?[ \t]*$", front[1], re.MULTILINE))
    name, identifier = keys.get("license_name"), keys.get("license")
    return name if identifier == "other" and name else identifier
