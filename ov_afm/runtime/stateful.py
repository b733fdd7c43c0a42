"""One answer at a time, with a KV cache that can be kept and put back.

GenAI's pipelines keep their KV cache to themselves. So OpenVINO itself runs the model here, with paged attention as in
GenAI, over a cache that is ours; and GenAI samples: its pipeline gets a model of a single operation, written in Python,
that takes tokens and gives the logits of the last one. Sampling, grammars and streaming stay GenAI's.

A prompt is computed in pieces that begin at multiples of `PIECE_TOKENS`, and only whole pieces are used
again. The rest is computed as it would be without them, so an answer is the same bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, GenerationError, SourceError
from ..model_dir.manifest import MODEL_XML
from .prompt_files import PromptFile, PromptFolder, common_length, digest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["LEAST_TOKENS", "PIECE_TOKENS", "PromptCache", "StatefulEngine"]

logger = logging.getLogger(__name__)

PIECE_TOKENS = 128
# A prompt is kept if it is as long as this, and the folder has not this share of it.
LEAST_TOKENS = 256
COVERED_SHARE = 0.75
# Tokens in a block of the cache: the CPU plugin's paged attention.
BLOCK_TOKENS = 32
# What states depend on beside model and code, by the names of the compiled model's properties.
MATTERS = (
    "INFERENCE_PRECISION_HINT",
    "KV_CACHE_PRECISION",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE",
    "EXECUTION_MODE_HINT",
    "INFERENCE_NUM_THREADS",
)
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class PromptCache:
    """Where computed prompts are kept.

    Attributes:
        folder: A folder that keeps them beyond the process; None for `save_prompt` and `load_prompt` alone.
        limit_gb: Most gigabytes of the folder.
    """

    folder: Path | None = None
    limit_gb: float = 10.0

    def __post_init__(self) -> None:
        """Refuse a bound that keeps nothing.

        Raises:
            ConfigError: With the value found.
        """
        if not self.limit_gb > 0:
            raise ConfigError(f"the bound of the prompt cache must be above 0 GB, found {self.limit_gb:g}")


class StatefulEngine:
    """A model on the CPU; used as GenAI's `LLMPipeline` is, by one caller at a time.

    Args:
        folder: Folder of the IR: the model directory, or the one that is packed for the kernels.
        model_dir: The model directory.
        key: Digest of the model.
        properties: OpenVINO's properties; `extensions` names libraries that the IR needs.
        cache: Where computed prompts are kept.

    Raises:
        ConfigError: The folder cannot be used.
        RuntimeError: OpenVINO cannot load the model.
    """

    def __init__(
        self, folder: Path, model_dir: Path, key: str, properties: Mapping[str, Any], cache: PromptCache
    ) -> None:
        import openvino_genai

        self._model = _Model(folder, key, properties)
        if cache.folder is not None:
            self._model.folder = PromptFolder(cache.folder, cache.limit_gb * 1e9, self._model.identity)
        self._tokenizer = openvino_genai.Tokenizer(model_dir)
        self._sampler = _sampling_pipeline(self._model, self._tokenizer)
        self._keeping: threading.Thread | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens of the last prompt that were not computed again."""
        return self._model.cached_tokens

    def get_tokenizer(self) -> Any:
        """GenAI's tokenizer."""
        return self._tokenizer

    def generate(self, inputs: Any, config: Any, streamer: Any = None) -> Any:
        """Answer a prompt; arguments and result are those of GenAI's `LLMPipeline.generate`."""
        self._wait()
        result = self._sampler.generate(inputs, config, *([] if streamer is None else [streamer]))
        if self._model.wants_keeping:
            # The answer is there; the next prompt waits for the disk, nobody else.
            self._keeping = threading.Thread(target=self._model.keep, name="ov_afm-keep-prompt")
            self._keeping.start()
        return result

    def save(self, ids: NDArray[np.int64], path: Path) -> int:
        """Compute a prompt and write its states; returns the tokens that the file holds.

        Args:
            ids: The prompt's tokens.
            path: The file; an older one is replaced.

        Raises:
            GenerationError: With code `prompt-too-short`: it has no whole piece.
            OSError: The file cannot be written.
        """
        self._wait()
        return self._model.save(ids, path)

    def load(self, path: Path) -> int:
        """Take a file's states for the next prompts that begin with its tokens; returns their number.

        Raises:
            SourceError: The file is damaged, or of another model, machine or version.
        """
        self._wait()
        return self._model.load(path)

    def _wait(self) -> None:
        if self._keeping is not None:
            self._keeping.join()
            self._keeping = None

    def close(self) -> None:
        """Finish what is being written."""
        self._wait()
        self._model.free()


class _Model:
    """The compiled model and the tokens whose states it holds."""

    def __init__(self, folder: Path, key: str, properties: Mapping[str, Any]) -> None:
        import numpy as np
        import openvino

        core = openvino.Core()
        properties = dict(properties)
        extensions = properties.pop("extensions", ())
        for library in extensions:
            core.add_extension(library)
        model = core.read_model(folder / MODEL_XML)
        _page(model)
        compiled = core.compile_model(model, "CPU", properties)
        self.vocab = int(compiled.output("logits").get_partial_shape()[2].get_length())
        libraries = [hashlib.sha256(Path(library).read_bytes()).hexdigest() for library in extensions]
        self.identity = digest(
            {
                "model": [key, folder.name if extensions else "plain", libraries],
                "cpu": str(core.get_property("CPU", "FULL_DEVICE_NAME")),
                "openvino": openvino.get_version(),
                "properties": {name: str(compiled.get_property(name)) for name in MATTERS},
                "piece": PIECE_TOKENS,
            }
        )
        self.folder: PromptFolder | None = None
        self.request = compiled.create_infer_request()
        self.cached_tokens = 0
        self.wants_keeping = False
        self._caches = {
            port.get_any_name(): _Cache(port) for port in compiled.inputs if "_cache." in port.get_any_name()
        }
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        # Tokens whose states the request holds; of those, the first `_whole` were computed in whole pieces.
        self._tokens: NDArray[np.int64] = np.zeros(0, np.int64)
        self._whole = 0
        # Files that the user named.
        self._files: list[PromptFile] = []

    def logits(self, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        """Logits (vocabulary) after some tokens; without `past` they are a new prompt."""
        import numpy as np

        if past == 0:
            return self._prompt(ids)
        self._tokens = np.concatenate([self._tokens, ids])
        return self._infer(ids, past)

    def _prompt(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        begin = self.cached_tokens = self._restore(ids)
        for first in range(begin, len(ids), PIECE_TOKENS):
            piece = ids[first : first + PIECE_TOKENS]
            logits = self._infer(piece, first)
            self._tokens = ids[: first + len(piece)]
            self._whole = len(self._tokens) // PIECE_TOKENS * PIECE_TOKENS
        new = self._whole >= LEAST_TOKENS and self._disk_has(ids) < COVERED_SHARE * self._whole
        self.wants_keeping = self.folder is not None and new
        return logits

    def _infer(self, ids: NDArray[np.int64], past: int) -> NDArray[np.float32]:
        import numpy as np

        count = past + len(ids)
        blocks = -(-count // BLOCK_TOKENS)
        self._grow(blocks)
        inputs = {
            "input_ids": ids,
            "position_ids": np.arange(past, count, dtype=np.int64),
            "past_lens": np.array([past], np.int32),
            "subsequence_begins": np.array([0, len(ids)], np.int32),
            "block_indices": np.arange(blocks, dtype=np.int32),
            "block_indices_begins": np.array([0, blocks], np.int32),
            "max_context_len": np.array(count, np.int32),
        }
        self.request.infer({name: value for name, value in inputs.items() if name in self._inputs})
        values: NDArray[np.float32] = self.request.get_tensor("logits").data.reshape(-1, self.vocab)[-1]
        return values

    def _grow(self, blocks: int) -> None:
        """See that the caches have so many blocks."""
        for name, cache in self._caches.items():
            if cache.grow(blocks):
                self.request.set_tensor(name, cache.tensor)

    def free(self) -> None:
        """Give the model's memory back; GenAI's core keeps the operation, and so this object."""
        self.request, self.folder, self._caches = None, None, {}

    def _disk_has(self, ids: NDArray[np.int64]) -> int:
        best = self.folder.best(ids) if self.folder else None
        return best[1] if best else 0

    def _restore(self, ids: NDArray[np.int64]) -> int:
        """Hold the states of as many of a prompt's first tokens as are known, and no others; returns their number."""

        def usable(common: int) -> int:
            # At least one token is computed, for its logits.
            return min(common, len(ids) - 1) // PIECE_TOKENS * PIECE_TOKENS

        held = usable(min(common_length(self._tokens, ids), self._whole))
        candidates = [(file, common_length(file.tokens, ids)) for file in self._files]
        if self.folder is not None and (best := self.folder.best(ids)):
            candidates.append(best)
        file, common = max(candidates, key=lambda candidate: candidate[1], default=(None, 0))
        if file is not None and usable(common) > held:
            try:
                self._put(file, usable(common))
                return usable(common)
            except (SourceError, OSError) as error:
                logger.warning("%s; it is computed again", error)
                self._forget(file)
                held = 0
        self._tokens, self._whole = ids[:held], held
        return held

    def _forget(self, file: PromptFile) -> None:
        if file in self._files:
            self._files.remove(file)
        elif self.folder is not None:
            self.folder.remove(file)
        self._clear()

    def _put(self, file: PromptFile, count: int) -> None:
        self._clear()
        blocks = count // BLOCK_TOKENS
        self._grow(blocks)
        for name, values in file.states(blocks):
            self._caches[name].blocks[:blocks] = values
        self._tokens, self._whole = file.tokens[:count], count
        if self.folder is not None:
            self.folder.used(file)

    def _clear(self) -> None:
        self._tokens, self._whole = self._tokens[:0], 0

    def _states(self, count: int) -> Iterator[tuple[str, NDArray[np.uint8]]]:
        """The blocks of the first tokens, one layer after the other."""
        for name, cache in self._caches.items():
            yield name, cache.blocks[: count // BLOCK_TOKENS]

    def keep(self) -> None:
        """Write the states of the last prompt to the folder; a folder that takes none is no reason to fail."""
        assert self.folder is not None
        self.wants_keeping = False
        try:
            self.folder.keep(self._tokens[: self._whole], self._states(self._whole))
        except OSError as error:
            logger.warning("the computed prompt could not be kept: %s", error)

    def save(self, ids: NDArray[np.int64], path: Path) -> int:
        whole = len(ids) // PIECE_TOKENS * PIECE_TOKENS
        if whole == 0:
            raise GenerationError(
                f"the prompt has {len(ids)} tokens; prompts are kept in pieces of {PIECE_TOKENS}, and a shorter one is "
                "computed in no time",
                code="prompt-too-short",
            )
        self._prompt(ids[:whole])
        PromptFile.write(path, self.identity, ids[:whole], self._states(whole))
        return whole

    def load(self, path: Path) -> int:
        file = PromptFile.read(path)
        if file.identity != self.identity:
            raise SourceError(
                f"{path} was computed by another model, processor or version, or with other properties; save it again",
                code="prompt-other-model",
            )
        try:
            self._put(file, len(file.tokens))
        except BaseException:
            self._clear()
            raise
        self._files.append(file)
        return len(file.tokens)


class _Cache:
    """Keys or values of one layer: blocks as bytes, and the tensor over them that OpenVINO reads and writes."""

    def __init__(self, port: Any) -> None:
        import numpy as np

        self._type = port.get_element_type()
        self._shape = [dimension.get_length() for dimension in list(port.get_partial_shape())[1:]]
        size = math.prod(self._shape) * self._type.bitwidth // 8
        self.blocks: NDArray[np.uint8] = np.zeros((0, size), np.uint8)
        self.tensor: Any = None

    def grow(self, count: int) -> bool:
        """Have at least so many blocks; whether the tensor is another one now."""
        import numpy as np
        import openvino

        if count <= len(self.blocks):
            return False
        larger = np.zeros(
            (max(count, 2 * len(self.blocks), LEAST_TOKENS // BLOCK_TOKENS), self.blocks.shape[1]), np.uint8
        )
        larger[: len(self.blocks)] = self.blocks
        self.blocks = larger
        self.tensor = openvino.Tensor(larger, openvino.Shape([len(larger), *self._shape]), self._type)
        return True


def _page(model: Any) -> None:
    """Give a model a paged KV cache as inputs, and logits of the last token alone: the head is much of a small step."""
    import numpy as np
    from openvino import opset13 as ops
    from openvino._offline_transformations import paged_attention_transformation

    paged_attention_transformation(model)
    head = model.output("logits").get_node().input_value(0).get_node()
    if head.get_type_name() == "MatMul":
        # Paged attention has the tokens where a batch was.
        last = ops.gather(head.input_value(0), ops.constant(np.array([-1])), ops.constant(np.int64(0)))
        head.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()


def _sampling_pipeline(model: _Model, tokenizer: Any) -> Any:
    """GenAI's pipeline over a model that asks ours for its logits."""
    import numpy as np
    import openvino
    import openvino_genai
    from openvino import opset13 as ops

    class Logits(openvino.Op):  # type: ignore[misc]
        """From token ids (1, new tokens) and attention mask (1, all tokens) to the last token's logits."""

        def __init__(self, inputs: Any = None) -> None:
            super().__init__(self, inputs)

        def validate_and_infer_types(self) -> None:
            self.set_output_type(0, openvino.Type.f32, openvino.PartialShape([1, 1, model.vocab]))

        def clone_with_new_inputs(self, inputs: Any) -> Logits:
            return Logits(inputs)

        def visit_attributes(self, _: Any) -> bool:
            return True

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            ids = np.array(inputs[0].data[0], np.int64)
            outputs[0].data[0, 0] = model.logits(ids, inputs[1].shape[1] - len(ids))
            return True

    # GenAI's core knows an operation by its name, and keeps the first that has it.
    Logits.__name__ = f"OvAfmLogits{next(_numbers)}"
    shapes = {"input_ids": ([-1, -1], np.int64), "attention_mask": ([-1, -1], np.int64), "beam_idx": ([-1], np.int32)}
    parameters = [ops.parameter(shape, kind, name=name) for name, (shape, kind) in shapes.items()]
    for parameter, name in zip(parameters, shapes, strict=True):
        parameter.output(0).set_names({name})
    logits = Logits([parameter.output(0) for parameter in parameters])
    logits.output(0).set_names({"logits"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.xml"
        openvino.save_model(openvino.Model([logits.output(0)], parameters, "logits"), path, compress_to_fp16=False)
        xml = path.read_text(encoding="utf-8")
    weights = openvino.Tensor(np.zeros(0, np.uint8))
    return openvino_genai.LLMPipeline(xml, weights, tokenizer, "CPU", ATTENTION_BACKEND="SDPA", extensions=[Logits])
