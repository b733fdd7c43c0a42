"""SentencePiece vocabularies become tokenizers that give the ids of SentencePiece and of llama.cpp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st
from support import pieces as support

from ov_afm.conversion.sentence_pieces import Pieces, build, segment

PIECES = Pieces(*support.vocabulary())
CASES = [pytest.param(case, id=repr(case["text"][:12])) for case in support.recorded()["texts"]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build(PIECES)


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_sentencepiece_and_llama_cpp(tokenizer: Any, case: dict[str, Any]) -> None:
    found = ids(tokenizer, case["text"])
    assert found == case["llama_cpp"]
    if case["sentencepiece"] is not None:
        assert found == case["sentencepiece"] == segment(PIECES, case["text"])
        assert tokenizer.decode(found) == case["text"].replace("\u2581", " ")


@hypothesis.settings(max_examples=300, deadline=None, database=None)
@hypothesis.given(text=st.text(st.sampled_from("  \t\n\u2581abehiknorstux09.,()<>=你🙂\u0301"), max_size=40))
def test_merges_follow_the_rule(tokenizer: Any, text: str) -> None:
    assert ids(tokenizer, text) == segment(PIECES, text)


@pytest.mark.parametrize(("prefix", "tokens"), [("always", "▁▁ he"), ("first", "▁ he"), ("never", "▁ he")])
def test_space_before_text(prefix: Any, tokens: str) -> None:
    tokenizer = build(dataclasses.replace(PIECES, prefix=prefix))
    assert tokenizer.encode(" he").tokens == tokens.split()
    after = "▁ he" if prefix == "always" else "he"
    assert tokenizer.encode("<|im_end|>he").tokens == ["<|im_end|>", *after.split()]


def longer(pieces: Pieces) -> Pieces:
    return dataclasses.replace(pieces, scores=[*pieces.scores, 0.0])


def without_a_byte(pieces: Pieces) -> Pieces:
    return dataclasses.replace(pieces, texts=["nothing" if text == "<0x41>" else text for text in pieces.texts])


def twice(pieces: Pieces) -> Pieces:
    return dataclasses.replace(pieces, texts=[*pieces.texts[:-1], pieces.texts[-2]])


def no_unknown(pieces: Pieces) -> Pieces:
    return dataclasses.replace(pieces, types=[3, *pieces.types[1:]])


def beyond_merges(pieces: Pieces) -> Pieces:
    """A joint piece of a character that is no piece: a list of pairs never reaches it."""
    texts = list(pieces.texts)
    texts[texts.index("er")] = "e\u20ac"
    return dataclasses.replace(pieces, texts=texts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (longer, "512 pieces, 513 scores and 512 types"),
        (without_a_byte, "1 of the 256 bytes are no pieces"),
        (twice, "1 pieces occur twice"),
        (no_unknown, "no piece is the unknown one"),
        (beyond_merges, "but merges give"),
    ],
)
def test_vocabulary_that_cannot_be_expressed_is_refused(change: Callable[[Pieces], Pieces], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(change(PIECES))


def test_gguf_file_brings_its_tokenizer(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conversion import test_gguf
    from transformers import AutoTokenizer

    from ov_afm.conversion import sources

    monkeypatch.setenv("OV_AFM_CACHE", str(tmp_path / "cache"))
    path = test_gguf.write_gguf(tiny_checkpoint, tmp_path / "spm.gguf", tokenizer=support.add_to_gguf)
    source = sources.resolve(path)
    tokenizer = AutoTokenizer.from_pretrained(source.path)
    # The file does not say so; llama.cpp takes these.
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    assert (source.config["bos_token_id"], source.config["eos_token_id"]) == (1, 2)
    for case in support.recorded()["texts"]:
        assert tokenizer(case["text"]).input_ids == [1, *case["llama_cpp"]]
