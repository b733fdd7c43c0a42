"""`config.json` of a GGUF file: its geometry, and its rotary embedding in Hugging Face's terms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import SourceError

__all__ = ["ARCHITECTURES", "ROPE_FREQS", "check_numbers", "config_of", "need"]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "arcee": "ArceeForCausalLM"}
ROPE_FREQS = "rope_freqs.weight"
# Keys of an architecture that are read here, and others with the values that change nothing (None: any). Whatever else
# a file says of its architecture would be lost.
READ = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
)
WITHOUT_EFFECT: dict[str, tuple[Any, ...] | None] = {
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_group_count": (0,),
    "expert_group_used_count": (0,),
    "logit_scale": (1.0,),
    "attention.scale": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "pooling_type": None,
    "tensor_data_layout": None,
}


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
        SourceError: A value is missing, or has no place in the architecture, or the rotary embedding is of a kind that
            transformers cannot run.
    """

    def get(key: str) -> Any:
        return need(fields, f"{arch}.{key}", file)

    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = fields.get(f"{arch}.attention.key_length", hidden // heads)
    rows = int(tensors["token_embd.weight"].shape[1])
    _check_keys(file, arch, fields, head_dim, rows)
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
        "vocab_size": rows,
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


def check_numbers(file: str, arch: str, fields: Mapping[str, Any]) -> None:
    """Refuse lists, which stand for layers of several shapes, and what is no number of things.

    Raises:
        SourceError: As above.
    """
    for key in READ:
        value = fields.get(f"{arch}.{key}")
        real = key in ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scale_linear")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or (number and (real or isinstance(value, int)) and value > 0):
            continue
        raise SourceError(
            f"{arch}.{key} of {file} is {str(value)[:40]}, where one positive number is needed; use another file",
            code="gguf-value",
        )


def _check_keys(file: str, arch: str, fields: Mapping[str, Any], head_dim: int, rows: int) -> None:
    """Refuse what a file says of its architecture and `config.json` cannot say."""
    harmless = {**WITHOUT_EFFECT, "attention.value_length": (head_dim,), "vocab_size": (rows,)}
    for key, value in fields.items():
        name = key.removeprefix(f"{arch}.")
        if name == key or name in READ or name.startswith("rope.scaling."):
            continue
        allowed = harmless.get(name, ())
        if allowed is not None and value not in allowed:
            raise SourceError(
                f"{file} has {key} {str(value)[:40]}, which has no place in {arch}; use the safetensors model",
                code="gguf-value",
            )


def _decimal(value: float) -> float:
    """A number of a configuration, of which the file holds the float32: its shortest decimal form."""
    return float(str(np.float32(value)))


def _rope(file: str, arch: str, fields: Mapping[str, Any], tensors: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    theta = _decimal(fields.get(f"{arch}.rope.freq_base", 10000.0))
    scaling = {
        key.rpartition(".")[2]: value for key, value in fields.items() if key.startswith(f"{arch}.rope.scaling.")
    }
    scaling.pop("finetuned", None)
    factor = _decimal(scaling.pop("factor", fields.get(f"{arch}.rope.scale_linear", 1.0)))
    # As llama.cpp has it (`llama_model::load_hparams`, src/llama-model.cpp): a factor without a type is linear.
    kind = scaling.pop("type", "none" if factor == 1.0 else "linear")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated = fields.get(f"{arch}.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise SourceError(
            f"{file} rotates {rotated} of {head_dim} dimensions of a head, which {arch} cannot; use another file",
            code="gguf-rope-unsupported",
        )
    if ROPE_FREQS in tensors and (kind != "none" or scaling):
        raise _unsupported(file, f"{ROPE_FREQS} and type {kind}", scaling)
    if ROPE_FREQS in tensors:
        return _llama3_rope(file, np.asarray(tensors[ROPE_FREQS].data, np.float32), theta, head_dim)
    original = scaling.pop("original_context_length", None)
    attention = _decimal(scaling.pop("attn_factor", 1.0)) * _decimal(scaling.pop("yarn_attn_factor", 1.0))
    if kind in ("none", "linear"):
        if attention != 1.0:
            raise _unsupported(file, f"type {kind}", {"attn_factor": attention})
        return rope if kind == "none" else {**rope, "rope_type": "linear", "factor": factor}
    extension = scaling.pop("yarn_ext_factor", 1.0)
    betas = {f"beta_{end}": scaling.pop(f"yarn_beta_{end}", None) for end in ("fast", "slow")}
    if kind != "yarn" or original is None or extension != 1.0 or scaling:
        raise _unsupported(file, f"type {kind}", scaling)
    rope.update(rope_type="yarn", factor=factor, original_max_position_embeddings=original)
    rope.update({key: _decimal(value) for key, value in betas.items() if value is not None})
    if attention != 1.0:
        # llama.cpp multiplies YaRN's own scale (arXiv 2309.00071, eq. 22) by it; Hugging Face's replaces that scale.
        rope["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return rope


def _unsupported(file: str, what: str, scaling: Mapping[str, Any]) -> SourceError:
    settings = ", ".join([what, *(f"{key} {value}" for key, value in scaling.items())])
    return SourceError(
        f"rope scaling of {file} is not supported ({settings}); use the safetensors model", code="gguf-rope-unsupported"
    )


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
