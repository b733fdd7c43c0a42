"""Evaluation text: where it comes from, and how it is cut into blocks of tokens.

A block is scored by itself, from an empty cache. Confidence intervals resample blocks, because the tokens of one
passage are not independent of each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..conversion import source_tokenizer
from ..errors import ConfigError, SourceError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DEFAULT_TEXT", "Blocks", "Encoder", "Text", "cut", "load_text"]

# Written for this project, so that no model has seen it; it shares no passage with any calibration text.
DEFAULT_TEXT = Path(__file__).parent.parent / "quantization" / "data" / "evaluation.txt"
BLOCK_TOKENS = 512
# Fewer tokens than this say nothing about a model.
MINIMUM_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Text:
    """A text to evaluate on, and how much of it is used in which pieces.

    Attributes:
        name: File name, for records.
        content: The text.
        sha256: Of its UTF-8 bytes.
        tokens: Most tokens to use; None for all.
        block_tokens: Tokens of a block, start tokens included; each block is scored from an empty cache.
    """

    name: str
    content: str
    sha256: str
    tokens: int | None = None
    block_tokens: int = BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Blocks:
    """Token ids of a text, cut.

    Attributes:
        text: Name of the text.
        sha256: Of the text, the ids and where they are cut.
        ids: One array of int64 for each block; each begins with the model's own start tokens.
        start: How many start tokens those are; predicting them is not scored.
        block_tokens: Length of every block but the last.
        bytes_per_token: UTF-8 bytes of the text for each of its tokens, to compare models of different tokenizers.
    """

    text: str
    sha256: str
    ids: tuple[NDArray[np.int64], ...]
    start: int
    block_tokens: int
    bytes_per_token: float

    @property
    def scored(self) -> int:
        """Tokens whose prediction is scored: all but the first of each block."""
        return sum(len(block) - self.first_scored for block in self.ids)

    @property
    def first_scored(self) -> int:
        """Position of the first token of a block whose prediction is scored."""
        return max(1, self.start)


def load_text(path: str | Path | None = None, *, tokens: int | None = None, block_tokens: int = BLOCK_TOKENS) -> Text:
    """Read a text file; the packaged default if None.

    Raises:
        ConfigError: The file is missing, not UTF-8, or empty, or blocks are too short to say anything.
    """
    if block_tokens < MINIMUM_TOKENS:
        raise ConfigError(f"a block needs at least {MINIMUM_TOKENS} tokens, found {block_tokens}", code="block-short")
    file = DEFAULT_TEXT if path is None else Path(path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read evaluation text {file} ({error.strerror}); give a UTF-8 text file", code="text-unreadable"
        ) from error
    try:
        content = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"evaluation text {file.name} is not UTF-8 (byte {error.start}); convert it", code="text-encoding"
        ) from error
    if not content.strip():
        raise ConfigError(
            f"evaluation text {file.name} is empty; give a text of a few thousand words", code="text-empty"
        )
    return Text(file.name, content, hashlib.sha256(content.encode()).hexdigest(), tokens, block_tokens)


class Encoder:
    """The tokenizer of a model.

    Args:
        model: Model directory, or checkpoint folder (read with transformers).

    Attributes:
        start: Tokens that it puts before every text.

    Raises:
        SourceError: It cannot be read.
    """

    def __init__(self, model: Path) -> None:
        try:
            self._ids = _openvino(model) if (model / "openvino_tokenizer.xml").exists() else _transformers(model)
            # One letter, because some tokenizers fail on an empty text.
            plain, special = self._ids("a", False), self._ids("a", True)
        except (RuntimeError, ValueError, OSError) as error:
            raise SourceError(f"the tokenizer of {model} cannot be read: {error}") from error
        self.start = special[: special.index(plain[0])] if plain and plain[0] in special else []

    def __call__(self, text: str) -> list[int]:
        """Token ids of a text, without start tokens."""
        return self._ids(text, False)


def _openvino(model: Path) -> Callable[[str, bool], list[int]]:
    import openvino_genai

    tokenizer: Any = openvino_genai.Tokenizer(model)
    return lambda text, special: list(map(int, tokenizer.encode(text, add_special_tokens=special).input_ids.data[0]))


def _transformers(model: Path) -> Callable[[str, bool], list[int]]:
    tokenizer = source_tokenizer.load(model)
    return lambda text, special: list(tokenizer(text, add_special_tokens=special)["input_ids"])


def cut(text: Text, ids: list[int], start: list[int]) -> Blocks:
    """Cut the token ids of a text into blocks.

    Args:
        text: The text.
        ids: Its token ids.
        start: Tokens that begin every block.

    Raises:
        ConfigError: There are too few tokens to say anything.
    """
    import numpy as np

    used = ids if text.tokens is None else ids[: text.tokens]
    if len(used) < MINIMUM_TOKENS:
        raise ConfigError(
            f"evaluation text {text.name} gives {len(used)} tokens; at least {MINIMUM_TOKENS} are needed",
            code="text-short",
        )
    room = text.block_tokens - len(start)
    pieces = [used[first : first + room] for first in range(0, len(used), room)]
    if len(pieces) > 1 and len(pieces[-1]) < MINIMUM_TOKENS:
        pieces.pop()
    blocks = tuple(np.array([*start, *piece], dtype=np.int64) for piece in pieces)
    digest = hashlib.sha256(text.sha256.encode())
    for block in blocks:
        digest.update(len(block).to_bytes(4, "little") + block.tobytes())
    bytes_per_token = len(text.content.encode()) / len(ids)
    return Blocks(text.name, digest.hexdigest(), blocks, len(start), text.block_tokens, bytes_per_token)
