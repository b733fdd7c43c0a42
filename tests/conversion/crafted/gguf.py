"""GGUF files: types, tokenizers, splits."""

from __future__ import annotations

from pathlib import Path

from conversion import test_gguf
from conversion.crafted.tokenizers import ids_of
from support import crafted, pieces, tiny
from support.crafted import Case, Crafted


def split(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder)
    parts = test_gguf.split(test_gguf.write_gguf(folder, folder / "model.GGUF"), 3)
    return Crafted(model, source=parts[1])


def sentencepiece(folder: Path) -> Crafted:
    model = crafted.checkpoint(folder, bos_token_id=1)
    path = test_gguf.write_gguf(folder, folder / "model.gguf", tokenizer=pieces.add_to_gguf)

    def check(output: Path) -> None:
        ids = ids_of(output)
        for case in pieces.recorded()["texts"]:
            if "<0x" not in case["text"]:
                assert ids(case["text"]) == case["llama_cpp"], case["text"]

    return Crafted(model, source=path, check=check)


def without_rule(folder: Path) -> Crafted:
    crafted.checkpoint(folder)
    path = test_gguf.write_gguf(
        folder, folder / "model.gguf", change=lambda writer: writer.kv_data[0].pop("tokenizer.ggml.pre")
    )
    return Crafted(source=path)


def with_more_tokens(folder: Path) -> Crafted:
    crafted.checkpoint(folder, vocab_size=300)
    tiny.write_tokenizer(folder)
    return Crafted(source=test_gguf.write_gguf(folder, folder / "model.gguf"))


CASES: list[Case] = [
    Case(
        "split",
        "one file, or `NAME-00001-of-00003.gguf` of which any part is named; `.gguf` or `.GGUF`",
        "exact",
        "all parts are read, and hashed",
        split,
    ),
    Case(
        "sentencepiece",
        "tokenizer `llama` (SentencePiece)",
        "converted with a note",
        "the ids of llama.cpp; but OpenVINO takes text that spells a byte's token, such as `<0x0A>`, for that byte",
        sentencepiece,
        says=("<0x0A>",),
    ),
    Case(
        "no-rule",
        "tokenizer `gpt2` without `tokenizer.ggml.pre`",
        "refused",
        "llama.cpp guesses and warns; name the rule with `gguf-new-metadata`",
        without_rule,
        code="gguf-pre-tokenizer-missing",
        says=("tokenizer.ggml.pre", "gguf-new-metadata --pre-tokenizer"),
    ),
    Case(
        "beyond-embedding",
        "more tokens than the embedding has rows",
        "refused",
        "a prompt with such a token would fail",
        with_more_tokens,
        code="tokens-beyond-embedding",
        says=("300 rows",),
    ),
]
