"""A model as a function from tokens to logits, a chunk of positions at a time.

A vocabulary of 128,000 makes half a megabyte of logits a token, so no more
Model directories run through OpenVINO itself, not through GenAI's sampler, which shows only the chosen token.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion.checkpoint import find_weights
from ..conversion.tensors import load
from ..errors import OVAFMError, SourceError, last_line
from ..kernels.select import engine_model
from ..model_dir.inference import EXACT, decoder_inputs, input_names, log_softmax
from ..model_dir.manifest import MODEL_XML, verify
from ..system import resources
from ..system.interrupt import wait_for

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["IrModel", "LogitModel", "TorchModel", "log_probs", "opened"]

# Properties that are reported with the figures.
REPORTED = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION")
# 128 positions of 128,256 logits at f32 are 66 MB.
CHUNK_TOKENS = 128


class IrModel:
    """A model directory on CPU.

    Args:
        model_dir: The model directory.
        runtime_defaults: With what `Pipeline` sets on CPU (KV cache u8, bf16 where the processor has it) and the ReLU²
            kernels wherever the model is packed for them, also where `Pipeline` finds the plain model faster; instead
            of at f32, which keeps the runtime's rounding apart from that of the weights.

    Attributes:
        name: Name of its folder.
        vocab: Width of the logits.
        runtime: The precisions in force, as OpenVINO reports them.

    Raises:
        SourceError: OpenVINO cannot read or compile it.
    """

    def __init__(self, model_dir: Path, *, runtime_defaults: bool = False) -> None:
        import openvino

        self.name = model_dir.name
        core = openvino.Core()
        folder, extra = engine_model(model_dir, "CPU") if runtime_defaults else (model_dir, {})
        try:
            for library in extra.get("extensions", ()):
                core.add_extension(library)
            model = core.read_model(folder / MODEL_XML)
            compiled = wait_for(lambda: core.compile_model(model, "CPU", {} if runtime_defaults else EXACT))
        except RuntimeError as error:
            raise SourceError(f"OpenVINO cannot load {model_dir}: {last_line(error)}") from error
        self.runtime = {key: compiled.get_property(key).to_string() for key in REPORTED}
        self.runtime["kernels"] = "relu2" if extra else "none"
        self._inputs = input_names(compiled)
        self._request = compiled.create_infer_request()
        self.vocab = int(compiled.output("logits").get_partial_shape()[2].get_length())

    def logits(self, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Logits (positions, vocab) of a block from an empty cache, in chunks of positions; each replaces the last."""
        self._request.reset_state()
        for first in range(0, len(ids), CHUNK_TOKENS):
            inputs = decoder_inputs(ids[first : first + CHUNK_TOKENS], self._inputs, past=first)
            wait_for(lambda inputs=inputs: self._request.infer(inputs))  # type: ignore[misc]
            yield self._request.get_tensor("logits").data[0].astype("float32", copy=False)


class TorchModel:
    """A checkpoint in transformers, at f32 on CPU.

    Args:
        checkpoint: Checkpoint folder.

    Attributes:
        name: Name of its folder.
        vocab: Width of the logits.
        runtime: The precision in force.

    Raises:
        OVAFMError: It does not fit in memory, or transformers cannot read it.
    """

    def __init__(self, checkpoint: Path) -> None:
        resources.require("export", "torch", "transformers")
        self.name = checkpoint.name
        files = find_weights(checkpoint, allow_pickle=True)
        # bf16 or fp16 on disk, read in that type and then widened tensor by tensor.
        need = 3.0 * sum(path.stat().st_size for path in files) + 1e9
        free = resources.free_memory()
        if need > free:
            raise OVAFMError(
                f"the reference needs about {need / 1e9:.1f} GB of memory at f32, {free / 1e9:.1f} GB are free; "
                f"run: ov-afm export {checkpoint} --recipe fp16 --output DIR, and give DIR as the reference"
            )
        self._model = load(checkpoint, "float32").model
        self.vocab = int(self._model.config.vocab_size)
        self.runtime = {"INFERENCE_PRECISION_HINT": "f32 (transformers)", "KV_CACHE_PRECISION": "f32"}

    def logits(self, ids: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """See `IrModel.logits`."""
        import torch

        cache: Any = None
        for first in range(0, len(ids), CHUNK_TOKENS):
            chunk = torch.from_numpy(ids[first : first + CHUNK_TOKENS])[None]
            with torch.inference_mode():
                out = self._model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            yield out.logits[0].float().numpy()


LogitModel = IrModel | TorchModel


def log_probs(
    model: LogitModel, ids: NDArray[np.int64], first: int = 1
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Score a block's tokens from position `first` on, a chunk at a time.

    Yields:
        Log-probabilities (tokens, vocab) that predict the tokens, and the tokens.

    Raises:
        OVAFMError: The model gives logits that are not finite.
    """
    import numpy as np

    position = 0
    for logits in model.logits(ids):
        low, high = max(first - 1, position), min(len(ids) - 1, position + len(logits))
        if low < high:
            rows = logits[low - position : high - position]
            if not np.isfinite(rows).all():
                raise OVAFMError(
                    f"{model.name} gives logits that are not finite after {low + 1} tokens of a block; "
                    "the model is damaged",
                    code="logits-not-finite",
                )
            yield log_softmax(rows), ids[low + 1 : high + 1]
        position += len(logits)


@contextmanager
def opened(model: Path, *, runtime_defaults: bool = False) -> Iterator[LogitModel]:
    """Load a model directory or a checkpoint folder, and free its memory at the end.

    Args:
        model: The folder.
        runtime_defaults: See `IrModel`.

    Raises:
        OVAFMError: It cannot be loaded.
    """
    loaded: LogitModel
    if (model / MODEL_XML).exists():
        verify(model)
        loaded = IrModel(model, runtime_defaults=runtime_defaults)
    else:
        loaded = TorchModel(model)
    try:
        yield loaded
    finally:
        del loaded
        gc.collect()
