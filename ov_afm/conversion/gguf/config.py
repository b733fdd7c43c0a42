"""`config.json` of a GGUF file: its geometry, and its rotary embedding in Hugging Face's terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError

__all__ = ["ARCHITECTURES", "ROPE_FREQS", "config_of", "need"]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "arcee": "ArceeForCausalLM"}
ROPE_FREQS = "rope_freqs.weight"


def need(fields: Mapping[str, Any], key: str, file: str) -> Any:
    """A value that every model file has.

    Raises:
        SourceError: This file lacks it.
    """
    if key not in fields:
        raise SourceError(f"{file} has no {key}; it is no complete model file, fetch it again", code="gguf-incomplete")
    return fields[key]


def config_of(file: str, arch: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` for a llama or arcee GGUF file.

    Args:
        file: The file's name, for messages.
        arch: `general.architecture`.
        fields: Metadata by key.
        tensors: `gguf.ReaderTensor` by name.

    Raises:
        SourceError: A value is missing, or the rotary embedding is of a kind that transformers cannot run.
    """

    def get(key: str) -> Any:
        return need(fields, f"{arch}.{key}", file)

    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = fields.get(f"{arch}.attention.key_length", hidden // heads)
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_act": "relu2" if arch == "arcee" else "silu",
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(file, arch, fields, tensors, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in config.items() if value is not None}


def _decimal(value: float) -> float:
    """A number of a configuration, of which the file holds the float32: its shortest decimal form."""
    return float(str(np.float32(value)))


def _rope(file: str, arch: str, fields: Mapping[str, Any], tensors: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    theta = _decimal(fields.get(f"{arch}.rope.freq_base", 10000.0))
    scaling = {
        key.rpartition(".")[2]: value for key, value in fields.items() if key.startswith(f"{arch}.rope.scaling.")
    }
    kind = scaling.pop("type", "none")
    scaling.pop("finetuned", None)
    factor = _decimal(scaling.pop("factor", 1.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated = fields.get(f"{arch}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise SourceError(
            f"{file} rotates {rotated} of {head_dim} dimensions of a head, which {arch} cannot; use another file",
            code="gguf-rope-unsupported",
        )
    if ROPE_FREQS in tensors:
        return _llama3_rope(file, np.asarray(tensors[ROPE_FREQS].data, np.float32), theta, head_dim)
    if kind == "none":
        return rope
    if kind == "linear":
        return {**rope, "rope_type": "linear", "factor": factor}
    original = scaling.pop("original_context_length", None)
    attention = _decimal(scaling.pop("attn_factor", 1.0)) * _decimal(scaling.pop("yarn_attn_factor", 1.0))
    extension = scaling.pop("yarn_ext_factor", 1.0)
    betas = {f"beta_{end}": scaling.pop(f"yarn_beta_{end}", None) for end in ("fast", "slow")}
    if kind != "yarn" or original is None or extension != 1.0 or scaling:
        settings = ", ".join([f"type {kind}", *(f"{key} {value}" for key, value in scaling.items())])
        raise SourceError(
            f"rope scaling of {file} is not supported ({settings}); use the safetensors model",
            code="gguf-rope-unsupported",
        )
    rope.update(rope_type="yarn", factor=factor, original_max_position_embeddings=original)
    rope.update({key: _decimal(value) for key, value in betas.items() if value is not None})
    if attention != 1.0:
        # llama.cpp multiplies YaRN's own scale (arXiv 2309.00071, eq. 22) by it; Hugging Face's replaces that scale.
        rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return rope


def _llama3_rope(file: str, factors: NDArray[np.float32], theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling from the factors that llama.cpp computed of it, which are checked against its formula.

    The largest factor is the configured one. The stored value may miss it by some float32 roundings, which depend on
    the CPU that wrote the file, so the configured value is the shortest decimal number within those.
    """
    factor = _shortest_decimal(float(factors.max()), 8 * float(np.finfo(np.float32).eps))
    rope: dict[str, Any] = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((8192 / wavelength - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise SourceError(
            f"the rope frequencies of {file} are not those of Llama 3; use the safetensors model",
            code="gguf-rope-unsupported",
        )
    return rope


def _shortest_decimal(value: float, tolerance: float) -> float:
    """The number with the fewest significant digits whose relative distance from `value` is within `tolerance`."""
    rounded = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next(number for number in rounded if math.isclose(number, value, rel_tol=tolerance))
