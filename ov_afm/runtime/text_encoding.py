"""A loaded model for embeddings or reranking, on GenAI's pipelines.

GenAI cuts a text that is too long without a word, takes no token ids, and computes what it is given as one batch,
padded to its longest text. So texts are counted before, sorted by length and computed in bounded batches; token ids
become text again, and only those do that the tokenizer makes of that text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DeviceError, GenerationError, last_line
from ..model_dir.inference import EXACT
from ..model_dir.text_encoder import EMBEDDING, RERANKING, TextEncoder
from . import devices
from .rules import kind_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Counted", "LoadedEncoder", "load"]

# Tokens of a batch, padding included, and texts in it: more does not make a CPU faster, and memory grows with it.
BATCH_TOKENS = 8192
BATCH_TEXTS = 64
SAMPLE = "The quick brown fox jumps over the lazy dog."
# Cosine of an embedding, or difference of a score, that a device may be off from the CPU at f32.
DEVICE_COSINE, DEVICE_SCORE = 0.99, 0.05


class Counted:
    """Texts with their lengths, which a model takes as they are.

    Attributes:
        texts: The texts, prompts in front of them included.
        tokens: The length of each, at most that of the model.
    """

    def __init__(self, texts: Sequence[str], tokens: Sequence[int]) -> None:
        self.texts, self.tokens = list(texts), list(tokens)

    def batches(self) -> Iterator[list[int]]:
        """Places of texts that are computed together: texts of like length, so that little is padded."""
        batch: list[int] = []
        for index in sorted(range(len(self.texts)), key=lambda each: self.tokens[each]):
            # They come by length, so the new one would be the longest.
            if batch and (len(batch) == BATCH_TEXTS or (len(batch) + 1) * self.tokens[index] > BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch


class LoadedEncoder:
    """A model for embeddings or reranking on a device.

    Args:
        folder: Its folder.
        facts: What its manifest says of it.
        device: The device.
        properties: OpenVINO's properties.

    Raises:
        RuntimeError: OpenVINO cannot load it there.
    """

    def __init__(self, folder: Path, facts: TextEncoder, device: str, properties: Mapping[str, Any]) -> None:
        import openvino_genai

        self.facts, self.device = facts, device
        embedding = facts.task == EMBEDDING
        kind = openvino_genai.TextEmbeddingPipeline if embedding else openvino_genai.TextRerankPipeline
        config = kind.Config()
        config.max_length = facts.max_tokens
        if embedding:
            config.normalize = facts.normalize
            config.pooling_type = getattr(openvino_genai.TextEmbeddingPipeline.PoolingType, str(facts.pooling).upper())
        self._pipeline: Any = kind(str(folder), device, config, **properties)
        self._tokenizer = openvino_genai.Tokenizer(str(folder), **({} if embedding else {"add_second_input": True}))

    @property
    def takes_pairs(self) -> bool:
        """Whether the tokenizer joins a query and a text as the model needs it; GenAI would join them as plain text."""
        return bool(self._tokenizer.supports_paired_input())

    def count(self, texts: Sequence[str], *, query: str | None = None) -> list[int]:
        """Tokens of each text, the tokens around it included; with a query, of both together."""
        counts: list[int] = []
        for begin in range(0, len(texts), BATCH_TEXTS):
            part = list(texts[begin : begin + BATCH_TEXTS])
            encoded = (
                self._tokenizer.encode(part) if query is None else self._tokenizer.encode([query] * len(part), part)
            )
            counts += encoded.attention_mask.data.sum(axis=1).tolist()
        return counts

    def text_of(self, ids: Sequence[int]) -> str:
        """The text that has these tokens, with or without the tokens around a text.

        Raises:
            GenerationError: There is none.
        """
        try:
            text = str(self._tokenizer.decode(list(ids)))
        except (RuntimeError, TypeError):
            text = ""
        if list(ids) in (self.encode(text), self.encode(text, special=False)):
            return text
        raise GenerationError(
            "the token ids are none that this model's tokenizer makes of a text (clients that count tokens for another "
            "model send such); send the text itself"
        )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of a text."""
        return [int(each) for each in self._tokenizer.encode(text, add_special_tokens=special).input_ids.data[0]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens.

        Raises:
            GenerationError: The model has not all of them.
        """
        try:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))
        except (RuntimeError, TypeError) as error:
            raise GenerationError(f"the tokens are none of this model's: {last_line(error)}") from error

    def embed_batch(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of texts that are computed together, (texts, dimensions).

        Raises:
            GenerationError: The model gave numbers that are none.
        """
        import numpy as np

        return self._checked(np.array(self._pipeline.embed_documents(list(texts)), np.float32))

    def score_batch(self, query: str, texts: Sequence[str]) -> NDArray[np.float32]:
        """How well each text answers a query, from 0 to 1, (texts, 1).

        Raises:
            GenerationError: The model gave numbers that are none.
        """
        import numpy as np

        # One text a call: for more, OpenVINO's tokenizer (2026.4.1) writes the query beyond the room that it reserved,
        # once for each text (CombineSegments), which ends in an error or in a damaged heap.
        scores = [self._pipeline.rerank(query, [text])[0][1] for text in texts]
        return self._checked(np.array(scores, np.float32)[:, None])

    def _checked(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        import numpy as np

        if not np.isfinite(rows).all():
            raise GenerationError(f"the model gives no finite numbers for these texts on {self.device}")
        return rows

    def compute(self, texts: Counted, *, query: str | None = None) -> NDArray[np.float32]:
        """Embeddings of texts, or their scores for a query, one row each."""
        import numpy as np

        rows = np.zeros((len(texts.texts), self.facts.dimensions if query is None else 1), np.float32)
        for batch in texts.batches():
            part = [texts.texts[each] for each in batch]
            rows[batch] = self.embed_batch(part) if query is None else self.score_batch(query, part)
        return rows

    def count_checked(self, texts: Sequence[str], *, query: str | None = None, cut: bool = False) -> Counted:
        """Texts that fit the model.

        Args:
            texts: The texts.
            query: The query that each is read with.
            cut: Leave out the end of those that are too long.

        Raises:
            GenerationError: One is too long.
        """
        counts, limit = self.count(texts, query=query), self.facts.max_tokens
        for index, count in enumerate(counts):
            if count > limit and not cut:
                raise GenerationError(
                    f"text {index} has {count} tokens{' with the query' if query is not None else ''} and this model "
                    f"reads {limit}; send shorter pieces, or let their ends be left out (truncate_prompt_tokens: -1 in "
                    "the request, or ov-afm serve --truncate)"
                )
        return Counted(texts, [min(count, limit) for count in counts])


def load(folder: Path, facts: TextEncoder, device: str = "CPU", properties: Mapping[str, Any] | None = None) -> Any:
    """Load a model for embeddings or reranking on the first device that computes it right.

    Args:
        folder: The model directory.
        facts: What its manifest says of it.
        device: A device's name, or `AUTO`.
        properties: OpenVINO's properties.

    Returns:
        The `LoadedEncoder`.

    Raises:
        ConfigError: Such models do not run on that kind of device.
        DeviceError: No device can load it, or what it computes is not what the CPU does.
    """
    if kind_of(device.strip().upper()) == "NPU" or device.strip().upper() == devices.EMULATED_NPU:
        raise ConfigError(
            f"{folder.name} is a model for {facts.purpose}, and those run on CPU and GPU here, found {device}; give it "
            "another --device",
            code="encoder-device",
        )
    if facts.task == RERANKING:
        # A score of bf16 has three digits, and many documents the same.
        properties = {"INFERENCE_PRECISION_HINT": "f32", **(properties or {})}
    failures = []
    for choice in devices.choose(device):
        try:
            if choice.kind == "NPU":
                continue
            loaded = LoadedEncoder(folder, facts, choice.device, properties or {})
            if choice.kind != "CPU":
                _compare(loaded, LoadedEncoder(folder, facts, "CPU", EXACT))
        except (RuntimeError, DeviceError) as error:
            failures.append(f"{choice.label}: {last_line(error)}")
            continue
        return loaded
    raise DeviceError(f"{folder.name} could not be loaded: {'; '.join(failures)}", code="no-device-works")


def _compare(loaded: LoadedEncoder, exact: LoadedEncoder) -> None:
    """Refuse a device that computes something else than the CPU."""
    text = Counted([SAMPLE], loaded.count([SAMPLE]))
    query = None if loaded.facts.task == EMBEDDING else SAMPLE
    one, other = (each.compute(text, query=query)[0] for each in (loaded, exact))
    if query is not None:
        wrong = bool(abs(one - other) > DEVICE_SCORE)
    else:
        norms = float((one @ one) * (other @ other)) ** 0.5
        wrong = float(one @ other) < DEVICE_COSINE * norms
    if wrong:
        raise DeviceError("what it computes is not what the CPU does")
