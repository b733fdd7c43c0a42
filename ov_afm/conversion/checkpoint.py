"""Looking at a Hugging Face checkpoint folder before anything heavy is loaded from it.

What would fail ten minutes into an export is found here in milliseconds, from JSON files, headers and file lengths:
without torch or transformers, and without running code or pickles of the checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError
from ..model_dir.text_encoder import EMBEDDING, RERANKING, TEXT_GENERATION
from ..system.json_text import parse
from .rope import check_rope

__all__ = [
    "SUPPORTED",
    "StoredTensor",
    "check_config",
    "check_quantization_files",
    "check_tokenizer",
    "find_weights",
    "license_files",
    "license_in_card",
    "read_json",
    "safetensors_header",
    "stored_tensors",
]

# What the tests export, run and compare with transformers.
SUPPORTED = ("ArceeForCausalLM", "LlamaForCausalLM")
# Optimum-Intel 2.2 exports no ModernBERT any more.
ENCODERS = ("Bert", "Roberta", "XLMRoberta", "MPNet")
SUPPORTED_FOR: dict[str, tuple[str, ...]] = {
    TEXT_GENERATION: SUPPORTED,
    # sentence-transformers keeps the name of the class that was trained, whose head it does not use.
    EMBEDDING: tuple(f"{name}{kind}" for name in ENCODERS for kind in ("Model", "ForMaskedLM")),
    RERANKING: tuple(f"{name}ForSequenceClassification" for name in ENCODERS),
}

# What `Geometry` does not check. A text such as "false" would count as true.
FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), ((bool,), "true or false")),
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "initializer_range"), ((int, float), "a number")),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), ((dict,), "an object")),
    "layer_types": ((list,), "a list"),
    "model_type": ((str,), "text"),
}
LICENSE_NAMES = re.compile(r"(licen[cs]e|notice|copying|use_policy|acceptable_use)", re.IGNORECASE)
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"  # and the same with .index.json, for several files
# Types of weights that are what they say; whole numbers and 8-bit floats mean nothing without their scales.
FLOATS = ("BF16", "F16", "F32", "F64")
# Names of tensors that belong to packed or scaled weights: compressed-tensors, modelopt, GPTQ, AWQ, MLX, bitsandbytes.
PACKED = re.compile(
    r"(weight_packed|weight_shape|weight_zero_point|[a-z]*_scale(_inv|_2)?"
    r"|qweight|qzeros|g_idx|scales|biases|absmax|quant_map|nested_\w+|quant_state\.\w+|SCB)"
)
# Older encoders hold the numbers 0, 1, 2, ... as a tensor.
POSITIONS = re.compile(r"(.*\.)?embeddings\.position_ids")
# Files beside the weights that say how they were quantized, and the key that says so: modelopt, AutoGPTQ, AutoAWQ.
QUANTIZATION_FILES = {
    "hf_quant_config.json": ("quantization", "quant_algo"),
    "quantize_config.json": ("bits",),
    "quant_config.json": ("w_bit",),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the header of its file describes it.

    Attributes:
        file: The file.
        dtype: As safetensors names it: `BF16`.
        shape: Its sizes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        SourceError: It is not JSON, or not an object.
    """
    try:
        fields = parse(path.read_text(encoding="utf-8"))
    except PermissionError:
        raise  # The file may be right; `system.os_errors` has the advice.
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


def check_config(
    config: Mapping[str, Any], where: str, *, trust_remote_code: bool = False, task: str = TEXT_GENERATION
) -> None:
    """Refuse a configuration that no export could serve.

    Args:
        config: Contents of `config.json`.
        where: What to call the model in messages.
        trust_remote_code: Allow `auto_map`, that is Python code that comes with the checkpoint.
        task: What the model is for.

    Raises:
        SourceError: The architecture is not supported, a field has a value of the wrong kind, or the weights are
            quantized already.
    """
    if "auto_map" in config and not trust_remote_code:
        raise _remote_code(where, "config.json")
    architectures = config.get("architectures")
    supported = SUPPORTED_FOR[task]
    if not isinstance(architectures, list) or not architectures:
        raise SourceError(
            f"config.json of {where} names no architecture; supported are {', '.join(supported)}",
            code="architecture-missing",
        )
    if architectures[0] not in supported:
        other = next((each for each, names in SUPPORTED_FOR.items() if architectures[0] in names), None)
        hint = f"; it can be exported with --task {other}" if other else ""
        raise SourceError(
            f"architecture {architectures[0]} of {where} is not supported; supported are {', '.join(supported)}{hint}",
            code="architecture-unsupported",
        )
    _check_fields(config, where)
    if task == TEXT_GENERATION:
        check_rope(config, where)
    # compressed-tensors used the second key once; mlx-lm writes the third.
    for key in ("quantization_config", "compression_config", "quantization"):
        if quantization := config.get(key):
            method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
            raise _quantized(where, f"{method}")
    chosen = config.get("transformers_weights")
    if chosen not in (None, SAFETENSORS, f"{SAFETENSORS}.index.json"):
        raise SourceError(
            f"config.json of {where} names its own file of weights (transformers_weights: {chosen}); call the file "
            f"{SAFETENSORS} and delete that line",
            code="weights-ambiguous",
        )


def _check_fields(config: Mapping[str, Any], where: str) -> None:
    for name, (kinds, needed) in FIELDS.items():
        value = config.get(name)
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise SourceError(
                f"{name} in config.json of {where} must be {needed}, found {value!r}; correct it, or fetch it again",
                code="config-value",
            )


def _quantized(where: object, how: str) -> SourceError:
    return SourceError(
        f"weights of {where} are quantized already ({how}); start from the bf16, fp16 or fp32 checkpoint",
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
    """The weight files of a checkpoint, each checked to be whole: those that transformers reads, and no others.

    Args:
        folder: The checkpoint.
        allow_pickle: Accept `.bin` files where there are no safetensors. Unpickling runs code.

    Raises:
        SourceError: There are none, or it is unclear which they are; one is missing or damaged; they are quantized; or
            only pickles exist and are not allowed.
    """
    check_quantization_files(folder, folder)
    found = _found(folder, SAFETENSORS) or _found(folder, PICKLE)
    if (folder / "adapter_config.json").exists():
        raise _adapter(folder, beside_a_model=bool(found))
    if not found:
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        hint = f"; {others[0]} is not read without an index" if others else ""
        raise SourceError(
            f"no weights in {folder}: neither {SAFETENSORS} nor {SAFETENSORS}.index.json is there{hint}",
            code="weights-missing",
        )
    if found[0].suffix == ".safetensors":
        _check_unpacked(folder, stored_tensors(found))
    elif not allow_pickle:
        raise SourceError(
            f"{folder} has only pickled weights ({found[0].name}), and loading a pickle runs whatever code is in it; "
            "use a safetensors checkpoint, or add --allow-pickle if you trust its author",
            code="weights-pickled",
        )
    return found


def _adapter(folder: Path, *, beside_a_model: bool) -> SourceError:
    if not beside_a_model:
        return SourceError(
            f"{folder} is a LoRA adapter, not a model; merge it into its base model (peft: merge_and_unload) first",
            code="source-is-adapter",
        )
    return SourceError(
        f"{folder} holds a model and a LoRA adapter (adapter_config.json), which transformers would apply; move the "
        "adapter to a folder of its own, and merge it with --merge-adapter if it belongs to the model",
        code="source-holds-adapter",
    )


def _found(folder: Path, name: str) -> tuple[Path, ...]:
    """The file of that name, or the files that its index lists; none where there is neither."""
    single, index = folder / name, folder / f"{name}.index.json"
    if not index.exists():
        return (single,) if single.is_file() else ()
    names = _listed(index)
    if single.exists() and names != [name]:
        raise SourceError(
            f"{folder} holds two models: {name}, and {names[0]} and others by {index.name}; delete the one that is not "
            "meant",
            code="weights-ambiguous",
        )
    missing = [each for each in names if not (folder / each).is_file()]
    if missing:
        raise SourceError(
            f"{folder} lacks {missing[0]} ({len(missing)} of {len(names)} weight files are missing); fetch them again",
            code="weights-incomplete",
        )
    return tuple(folder / each for each in names)


def _listed(index: Path) -> list[str]:
    tensors = read_json(index).get("weight_map")
    if not isinstance(tensors, dict) or not tensors:
        raise SourceError(f"{index} has no weight_map; fetch the file again", code="weights-index-damaged")
    names = sorted(set(map(str, tensors.values())))
    elsewhere = [name for name in names if Path(name).name != name or "\\" in name]
    if elsewhere:
        raise SourceError(
            f"{index} lists {elsewhere[0]!r}, which is no file beside it; fetch the file again",
            code="weights-index-damaged",
        )
    return names


def check_quantization_files(folder: Path, where: object) -> None:
    """Refuse a checkpoint that a file beside its weights calls quantized.

    Args:
        folder: The checkpoint; its weights need not be there.
        where: What to call the model in messages.

    Raises:
        SourceError: There is such a file.
    """
    for name, keys in QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            value: Any = read_json(folder / name)
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                raise _quantized(where, f"{name} says {keys[-1]} {value}")


def _check_unpacked(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse weights that are packed, or numbers that have to be scaled."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS and not POSITIONS.fullmatch(name):
            raise _quantized(folder, f"{name} is {tensor.dtype}")
        if PACKED.fullmatch(name.rpartition(".")[2]):
            raise _quantized(folder, f"{name} belongs to packed weights")


def stored_tensors(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """What safetensors files hold, by name.

    Raises:
        SourceError: One is damaged, does not hold what the index beside it says, or holds a tensor that another holds.
    """
    headers = {file.name: _header(file) for file in files}
    index = files[0].with_name(f"{SAFETENSORS}.index.json")
    for name, file_name in (read_json(index)["weight_map"] if index.exists() else {}).items():
        if name not in headers[str(file_name)]:
            raise SourceError(
                f"{index.with_name(str(file_name))} does not hold {name}, which {index.name} says it does; "
                "fetch both again",
                code="weights-index-damaged",
            )
    tensors: dict[str, StoredTensor] = {}
    for held in headers.values():
        for name in held.keys() & tensors.keys():
            raise SourceError(
                f"{tensors[name].file} and {held[name].file.name} both hold {name}; fetch the checkpoint again",
                code="weights-ambiguous",
            )
        tensors.update(held)
    return tensors


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file whose length fits its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {name: StoredTensor(path, it.get_dtype(), tuple(it.get_shape())) for name, it in slices.items()}
    except PermissionError:
        raise
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
