"""SentencePiece vocabularies, of a GGUF file or of a `tokenizer.model`, as tokenizers of Hugging Face's library.

SentencePiece's BPE has no merges: it joins the neighbours whose joint piece has the best score, the leftmost of equals.
Characters that are no piece become bytes. `tokenizers` wants a list of pairs in the order of preference, which follows
from the scores. Each conversion is compared with the rule itself, applied slowly (`segment`), on texts and on joined
pieces of the vocabulary: where a list of pairs cannot express the scores, it shows there.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..runtime.text_proof import TEXTS

__all__ = ["BYTE", "CONTROL", "NORMAL", "UNKNOWN", "UNUSED", "USER_DEFINED", "Pieces", "Prefix", "build", "segment"]

# Types of pieces: `ModelProto.SentencePiece.Type` in sentencepiece_model.proto, and `llama_token_type` of GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
PROBES = 200

Prefix = Literal["always", "first", "never"]


@dataclass(frozen=True)
class Pieces:
    """A vocabulary, and what is done with text before it is cut.

    Attributes:
        texts: The pieces; spaces are "▁", bytes `<0x0A>`.
        scores: Log-probability or rank of each.
        types: Type of each.
        prefix: Where a space is put before text: `always`, at its beginning and after each control token, as
            SentencePiece does with each text that it is given; `first`, at its beginning, unless a space or a control
            token is there, as transformers does without `legacy`; `never`.
    """

    texts: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    prefix: Prefix = "always"

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids of the pieces by their text."""
        return {text: index for index, text in enumerate(self.texts)}

    @cached_property
    def plain(self) -> dict[str, float]:
        """Scores of the pieces that text is cut into; the others stand for bytes, or are found before it is cut."""
        rows = zip(self.texts, self.scores, self.types, strict=True)
        return {text: score for text, score, kind in rows if kind in (NORMAL, UNUSED)}


def build(pieces: Pieces) -> Any:
    """A `tokenizers.Tokenizer` without post-processing.

    Raises:
        ValueError: The vocabulary contradicts itself, or `tokenizers` cannot express it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers

    _check(pieces)
    tokenizer = Tokenizer(_model(pieces))
    if pieces.prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:
        prefix = [normalizers.Prepend(SPACE)] if pieces.prefix == "always" else []
        tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(content=" ", left=1, right=0)] if pieces.prefix != "never" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for text, kind in zip(pieces.texts, pieces.types, strict=True):
        if kind in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False)])
    _prove(pieces, tokenizer)
    return tokenizer


def _check(pieces: Pieces) -> None:
    if not len(pieces.texts) == len(pieces.scores) == len(pieces.types):
        raise ValueError(f"{len(pieces.texts)} pieces, {len(pieces.scores)} scores and {len(pieces.types)} types")
    if len(pieces.ids) < len(pieces.texts):
        raise ValueError(f"{len(pieces.texts) - len(pieces.ids)} pieces occur twice")
    missing = [text for text in map(_byte, range(256)) if text not in pieces.ids]
    if missing:
        raise ValueError(f"{len(missing)} of the 256 bytes are no pieces, so some text has no tokens")
    if UNKNOWN not in pieces.types:
        raise ValueError("no piece is the unknown one")


def _byte(value: int) -> str:
    return f"<0x{value:02X}>"


def _model(pieces: Pieces) -> Any:
    from tokenizers import models

    unknown = list(pieces.types).index(UNKNOWN)
    plain = pieces.plain
    by_score = sorted(plain, key=lambda text: -plain[text])
    pairs = ((text[:cut], text[cut:]) for text in by_score for cut in range(1, len(text)))
    merges = [(first, second) for first, second in pairs if first in plain and second in plain]
    return models.BPE(pieces.ids, merges, unk_token=pieces.texts[unknown], fuse_unk=True, byte_fallback=True)


def _prove(pieces: Pieces, tokenizer: Any) -> None:
    """Compare with the rule itself, on texts and on joined pieces."""
    choose = random.Random(0)
    plain = sorted(pieces.plain)
    joined = ("".join(choose.choices(plain, k=6)).replace(SPACE, " ") for _ in range(PROBES))
    found_whole = (UNKNOWN, CONTROL, USER_DEFINED)
    special = [text for text, kind in zip(pieces.texts, pieces.types, strict=True) if kind in found_whole]
    for text in (*TEXTS, *joined):
        if any(each in text for each in special):
            continue
        if pieces.prefix == "first":
            text = text.lstrip(" ")
        ids, expected = tokenizer.encode(text, add_special_tokens=False).ids, segment(pieces, text)
        if ids != expected:
            raise ValueError(f"{text[:24]!r} has the tokens {expected[:8]}, but merges give {ids[:8]}")


# -- The rule itself


def segment(pieces: Pieces, text: str) -> list[int]:
    """Ids of a text without control tokens, by SentencePiece's own rule."""
    prepared = text.replace(" ", SPACE)
    if pieces.prefix != "never" and prepared:
        prepared = SPACE + prepared
    found: list[int] = []
    for part in _merged(pieces, prepared):
        tokens = [part] if part in pieces.plain else map(_byte, part.encode())
        found += [pieces.ids[token] for token in tokens]
    return found


def _merged(pieces: Pieces, text: str) -> list[str]:
    """Neighbours are joined by score, leftmost first (`Model::SampleEncode` in google/sentencepiece's bpe_model.cc)."""
    plain, parts = pieces.plain, list(text)
    while len(parts) > 1:
        scores = [plain.get(first + second, -math.inf) for first, second in itertools.pairwise(parts)]
        best = max(scores)
        if best == -math.inf:
            break
        at = scores.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
