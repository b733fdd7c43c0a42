"""Running a decoder IR by hand: exact properties, the inputs that it takes, and what is computed from its logits.

Everything that proves, measures or calibrates a model runs its IR with these, without a GenAI pipeline.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    # Not at run time: `import ov_afm` must stay cheap.
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["EXACT", "decoder_inputs", "input_names", "ir_logits", "kl_divergence", "log_softmax"]

F = TypeVar("F", bound="np.floating[Any]")
# OpenVINO's defaults differ between CPUs: bf16 where the CPU has it, an 8-bit KV cache, activations rounded to int8.
EXACT: dict[str, Any] = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
}


def input_names(model: Any) -> set[str]:
    """Names of the inputs of an `openvino.Model` or of a compiled model."""
    return {name for port in model.inputs for name in port.get_names()}


def decoder_inputs(
    ids: Sequence[int] | NDArray[np.int64], names: Collection[str], *, past: int = 0
) -> dict[str, NDArray[Any]]:
    """Inputs of a stateful decoder IR for some tokens.

    Args:
        ids: Token ids, (tokens,) or (batch, tokens).
        names: Inputs that the IR has (see `input_names`); those that it lacks are left out.
        past: Tokens that its KV cache holds already.
    """
    import numpy as np

    tokens = np.atleast_2d(np.asarray(ids, np.int64))
    batch, count = tokens.shape
    inputs: dict[str, NDArray[Any]] = {
        "input_ids": tokens,
        "attention_mask": np.ones((batch, past + count), np.int64),
        "position_ids": np.tile(np.arange(past, past + count, dtype=np.int64), (batch, 1)),
        "beam_idx": np.arange(batch, dtype=np.int32),
    }
    return {name: value for name, value in inputs.items() if name in names}


def ir_logits(ir: Path, ids: Sequence[int], **properties: Any) -> NDArray[np.float32]:
    """Logits (tokens, vocabulary) of a stateful IR on CPU; exact unless `properties` change that."""
    import numpy as np
    import openvino

    compiled = openvino.Core().compile_model(ir, "CPU", {**EXACT, **properties})
    request = compiled.create_infer_request()
    request.infer(decoder_inputs(ids, input_names(compiled)))
    return np.array(request.get_tensor("logits").data[0], np.float32)


def log_softmax(logits: NDArray[F]) -> NDArray[F]:
    """Log-probabilities over the last axis, in the type of `logits`; sums are taken at f64."""
    import numpy as np

    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64)
    result: NDArray[F] = shifted - np.log(total).astype(logits.dtype)
    return result


def kl_divergence(log_p: NDArray[F], log_q: NDArray[F]) -> NDArray[F]:
    """KL(p || q) in nats over the last axis; `log_p` need be normalised only up to rounding."""
    import numpy as np

    p = np.exp(log_p)
    mass = p.sum(-1, dtype=np.float64)
    # Summed at f64: for models that are close it is a small difference of large terms.
    divergence = (p * (log_p - log_q)).sum(-1, dtype=np.float64) / mass - np.log(mass)
    result: NDArray[F] = np.maximum(divergence, 0).astype(log_p.dtype)
    return result
