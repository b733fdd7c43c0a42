"""Text that is streamed is never half a character, never a stop string, and never taken back."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ov_afm.runtime.detokenize import Detokenizer, TextAssembler, decoder

BYTES = {index: bytes([index]) for index in range(256)}


def decode(tokens: list[int]) -> str:
    """A byte-level tokenizer's decoding, as OpenVINO's detokenizer does it."""
    return bytes(tokens).decode("utf-8", "replace")


def stream(data: bytes, stop: tuple[str, ...] = (), whole: tuple[str, str] | None = None) -> list[str]:
    assembler = TextAssembler(decode, BYTES, stop, whole)
    pieces = []
    for token in data:
        pieces.append(assembler.push(token))
        if assembler.stopped:
            return pieces
    return [*pieces, assembler.finish()]


@given(st.text())
def test_characters_split_over_tokens_arrive_whole(text: str) -> None:
    pieces = stream(text.encode())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@given(st.binary())
@example(b"\xed\xa0")
@example(b"\xff\xe2\x82")
def test_invalid_bytes_are_shown_but_an_unfinished_end_is_not(data: bytes) -> None:
    def can_go_on(size: int) -> bool:
        end = data[len(data) - size :]
        return any(
            _valid(end + bytes(rest)) for length in (1, 2, 3) for rest in product((0x80, 0x90, 0xBF), repeat=length)
        )

    unfinished = next((size for size in (3, 2, 1) if size <= len(data) and can_go_on(size)), 0)
    assert "".join(stream(data)) == data[: len(data) - unfinished].decode("utf-8", "replace")


def _valid(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def test_answer_cut_within_a_character_ends_before_it() -> None:
    assert "".join(stream("ab🙂".encode()[:-1])) == "ab"


def test_replacement_character_that_the_model_wrote_is_kept_at_the_end() -> None:
    assert "".join(stream("ab\ufffd".encode())) == "ab\ufffd"


@given(st.text(alphabet="ab#\n", max_size=30), st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), max_size=3))
def test_stop_strings_never_reach_the_stream(text: str, stops: list[str]) -> None:
    shown = "".join(stream(text.encode(), tuple(stops)))
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    if not any(stop in text for stop in stops):
        assert shown == text


@pytest.mark.parametrize("stop", ["###", "#\n", "end"])
def test_text_before_a_stop_string_is_complete(stop: str) -> None:
    assert "".join(stream(f"one # two{stop}three".encode(), (stop,))) == "one # two"


def test_tail_that_could_become_a_stop_string_is_released_at_the_end() -> None:
    pieces = stream(b"ab##", ("###",))
    assert pieces[-1] == "##"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a(b#c)d#e", "a(b#c)d"),
        ("a#(b)", "a"),
        ("(##)(#)a", "(##)(#)a"),
        ("(a#b", "(a#b"),
        ("(a)#(b)", "(a)"),
        ("a)b#", "a)b"),
    ],
)
def test_no_stop_string_cuts_a_part_that_is_whole(text: str, shown: str) -> None:
    assert "".join(stream(text.encode(), ("#",), ("(", ")"))) == shown
    assert "".join(stream(text.replace("(", "<<").encode(), ("#",), ("<<", ")"))) == shown.replace("(", "<<")


def test_special_tokens_that_are_to_be_shown_have_their_text() -> None:
    class Tokenizer:
        """Tokens 1 and 2 are special; 1 is `<think>`."""

        def get_vocab(self) -> dict[bytes, int]:
            return {b"a": 0, b"<think>": 1, b"<end>": 2}

        def decode(self, tokens: Any, skip_special_tokens: bool = True) -> Any:
            if tokens and isinstance(tokens[0], list):
                return [self.decode(each) for each in tokens]
            return "".join("a" for token in tokens if token == 0)

    assembler = Detokenizer(Tokenizer(), {2}, {1: "<think>", 0: "a"}).assembler()
    assert [assembler.push(token) for token in (1, 0, 2, 1, 1, 0)] == ["<think>", "a", "", "<think>", "<think>", "a"]


def test_byte_tokens_of_sentencepiece_are_bytes() -> None:
    pieces = {0: b"a", 1: b"<0xE2>", 2: b"<0x82>", 3: b"<0xAC>"}
    raw = {0: b"a", 1: b"\xe2", 2: b"\x82", 3: b"\xac"}

    def decode_pieces(tokens: list[int]) -> str:
        return b"".join(raw[token] for token in tokens).decode("utf-8", "replace")

    assembler = TextAssembler(decode_pieces, pieces)
    assert [assembler.push(token) for token in (0, 1, 2, 3)] == ["a", "", "", "€"]
    cut = TextAssembler(decode_pieces, pieces)
    assert "".join([*(cut.push(token) for token in (0, 1, 2)), cut.finish()]) == "a"


def test_a_byte_level_vocabulary_is_decoded_as_the_engine_does_it(tiny_model: Path) -> None:
    import openvino_genai

    tokenizer = openvino_genai.Tokenizer(tiny_model)
    ours = Detokenizer(tokenizer).decode
    assert ours != tokenizer.decode
    # Half characters, special tokens and numbers without a token among them.
    source = random.Random(0)
    for length in (1, 2, 3, 5, 8, 40):
        for _ in range(100):
            tokens = [source.randrange(512) for _ in range(length)]
            # How many marks stand for bytes that are no text differs.
            assert re.sub("\ufffd+", "\ufffd", ours(tokens)) == re.sub("\ufffd+", "\ufffd", tokenizer.decode(tokens))


def engine(text_of: Callable[[list[int]], str]) -> Callable[[Any], Any]:
    return lambda tokens: [text_of(row) for row in tokens] if isinstance(tokens[0], list) else text_of(tokens)


PIECES = {0: b"<s>", 1: b" a", 2: b"b", 3: b" ."}


def test_bytes_that_are_no_text_are_marked_as_by_hugging_face(tiny_checkpoint: Path, tiny_model: Path) -> None:
    import openvino_genai
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer = openvino_genai.Tokenizer(tiny_model)
    ours = Detokenizer(tokenizer).decode
    source = random.Random(1)
    for _ in range(300):
        tokens = [source.randrange(3, 377) for _ in range(12)]
        assert ours(tokens) == reference.decode(tokens, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    "text_of",
    [
        lambda tokens: "".join(PIECES[each].decode() for each in tokens if each).lstrip(),
        lambda tokens: "".join(PIECES[each].decode() for each in tokens if each).replace(" .", "."),
        lambda tokens: "-".join(PIECES[each].decode() for each in tokens if each),
        lambda tokens: "".join(PIECES[each].decode() for each in tokens),
    ],
    ids=["first-space-lost", "cleaned-up", "joined-otherwise", "special-tokens-shown"],
)
def test_any_other_vocabulary_is_left_to_the_engine(text_of: Callable[[list[int]], str]) -> None:
    decode = engine(text_of)
    found = decoder(decode, PIECES)
    for tokens in product(PIECES, repeat=3):
        assert found(list(tokens)) == decode(list(tokens))
    assert decoder(decode, {}) is decode
