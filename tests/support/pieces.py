"""A SentencePiece vocabulary of 512 pieces, and texts with the ids that SentencePiece and llama.cpp give them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

__all__ = ["add_to_gguf", "recorded", "vocabulary", "write_model"]

DATA = Path(__file__).parents[1] / "conversion" / "data" / "sentencepiece.json"


@functools.cache
def recorded() -> Any:
    """`pieces` (text, score, type), and `texts` with the ids of both programs; versions are in `made_with`.

    SentencePiece has no ids for texts with control tokens, which it does not look for.
    """
    return json.loads(DATA.read_text(encoding="utf-8"))


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Texts, scores and types of the pieces."""
    texts, scores, types = zip(*recorded()["pieces"], strict=True)
    return list(texts), list(scores), list(types)


def add_to_gguf(writer: Any) -> None:
    """Give a `gguf.GGUFWriter` this vocabulary, as llama.cpp's converter writes it."""
    texts, scores, types = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)


def write_model(path: Path, *, algorithm: int = 2, **normalizer: Any) -> Path:
    """Write a `tokenizer.model` of this vocabulary.

    Args:
        path: The file.
        algorithm: 1 is unigram, 2 BPE.
        normalizer: Fields of its `normalizer_spec`.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    for text, score, kind in zip(*vocabulary(), strict=True):
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type = algorithm
    model.trainer_spec.byte_fallback = True
    settings = {"name": "identity", "add_dummy_prefix": True, "remove_extra_whitespaces": False, **normalizer}
    for name, value in settings.items():
        setattr(model.normalizer_spec, name, value)
    path.write_bytes(model.SerializeToString())
    return path
