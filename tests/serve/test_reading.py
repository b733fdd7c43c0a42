"""Calls and thoughts read from an answer: the same however the text comes in pieces, and no part of a tag leaks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ov_afm.serve.answers import Answer, AnswerReader
from ov_afm.serve.grammar import CALL_END, call_begin
from ov_afm.serve.messages import Piece
from ov_afm.serve.prometheus import Metrics

NAMES = ["get_weather", "get", "mcp__files.read-all"]
TAGS = ("<think>", "</think>")
METRICS = Metrics()
# Texts that hold what might be taken for the beginning or the end of a tag.
PLAIN = st.lists(
    st.sampled_from(
        ["a", "1 < 2", "<", "</", "<tool", "<tool_call>", "</tool_call>", "<think", "}", "\n", " ", '{"name": "get"']
    ),
    max_size=5,
).map("".join)
VALUES = st.dictionaries(
    st.text(max_size=3), st.text(max_size=6) | st.sampled_from(["}\n</tool_call>", "<tool_call>", "}"]), max_size=3
)


def call(name: str, arguments: Any) -> str:
    return call_begin(name) + json.dumps(arguments) + CALL_END


def read(
    pieces: Iterable[str], end: str = "stop", *, tags: tuple[str, str] | None = None, thinking: bool = False
) -> tuple[dict[str, str], list[dict[str, str]], bool]:
    """The joined text by field, the calls, and whether the answer is calls."""
    answer = Answer("tiny", True, METRICS, functions=NAMES, reasoning=tags)
    reader = AnswerReader(answer, thinking=thinking)
    sent = list(pieces) or [""]
    deltas = [
        delta
        for number, text in enumerate(sent, 1)
        for delta in reader.push(Piece(1, text, 1, end=end if number == len(sent) else None))
    ]
    texts: dict[str, str] = {}
    calls: list[dict[str, str]] = []
    for delta in deltas:
        for kind, value in delta.items():
            if kind != "tool_calls":
                assert value
                texts[kind] = texts.get(kind, "") + value
                continue
            (entry,) = value
            if "id" in entry:
                assert entry["index"] == len(calls)
                calls.append(dict(entry["function"]))
            else:
                calls[entry["index"]]["arguments"] += entry["function"]["arguments"]
    return texts, calls, reader.has_calls


@st.composite
def split(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> tuple[str, list[str]]:
    """A text, and pieces of it."""
    text = draw(texts)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=len(text))))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


ANSWERS = st.lists(PLAIN | st.builds(call, st.sampled_from(NAMES), VALUES), max_size=5).map("".join)


@settings(deadline=None)
@given(split(ANSWERS), st.sampled_from(["stop", "length"]))
def test_any_split_into_pieces_gives_the_same(case: tuple[str, list[str]], end: str) -> None:
    text, pieces = case
    assert read(pieces, end) == read([text], end)


@settings(deadline=None)
@given(
    split(st.tuples(st.sampled_from(["", "<think>", "\n<think>\n", "</think>"]), ANSWERS).map("".join)), st.booleans()
)
def test_any_split_gives_the_same_with_thoughts(case: tuple[str, list[str]], thinking: bool) -> None:
    text, pieces = case
    for end in ("stop", "length"):
        assert read(pieces, end, tags=TAGS, thinking=thinking) == read([text], end, tags=TAGS, thinking=thinking)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(NAMES), VALUES), min_size=1, max_size=3), st.sampled_from(["", "Let me look.\n"])
)
def test_calls_are_what_was_written_and_cut_anywhere_nothing_of_a_tag_is_seen(
    calls: Sequence[tuple[str, Any]], before: str
) -> None:
    text = before + "\n".join(call(name, arguments) for name, arguments in calls)
    texts, got, are_calls = read([text])
    assert texts.get("content", "") == before
    assert [(each["name"], json.loads(each["arguments"])) for each in got] == list(calls)
    assert are_calls
    for length in range(len(text)):
        texts, cut, are_calls = read([text[:length]], "length")
        assert before.startswith(texts.get("content", ""))
        for part, whole in zip(cut, got, strict=False):
            assert part["name"] == whole["name"]
            assert whole["arguments"].startswith(part["arguments"])
        # A call without its end is none, although its arguments may be whole.
        assert are_calls == (0 < len(cut) == text[:length].count(CALL_END))


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("1 <", "1 <"),
        ("a <tool", "a <tool"),
        ('<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>', ...),
        ('{"text": "<tool_call> <think>"}', ...),
        ("  ", "  "),
        ("\n\nHello\n", "\n\nHello\n"),
    ],
)
def test_text_that_is_no_call_stays_text(text: str, content: Any) -> None:
    assert read([text]) == ({"content": text if content is ... else content}, [], False)


@pytest.mark.parametrize(
    ("text", "thinking", "thoughts", "content"),
    [
        ("<think>\nOne.\n</think>\n\nTwo.", False, "One.", "Two."),
        ("One.\n</think>\n\nTwo.", True, "One.", "Two."),
        ("<think>\nOne.</think>Two.", True, "One.", "Two."),
        ("\n<think>\n\n</think>\n\nTwo.", False, "", "Two."),
        ("Two. <think>x</think>", False, "", "Two. <think>x</think>"),
        ("<think>1 < 2\n\n3", False, "1 < 2\n\n3", ""),
        ("<think>One.</think>\n" + call("get", {}), False, "One.", ""),
        ("<thin", False, "", "<thin"),
    ],
)
def test_thoughts_are_apart_from_the_answer(text: str, thinking: bool, thoughts: str, content: str) -> None:
    texts, calls, _ = read([text], tags=TAGS, thinking=thinking)
    assert (texts.get("reasoning_content", ""), texts.get("content", "")) == (thoughts, content)
    assert len(calls) == text.count("<tool_call>")


def test_an_answer_cut_off_within_a_tag_of_thoughts_shows_none_of_it() -> None:
    text = "<think>One.</think>Two."
    for length in range(len(text)):
        texts, _, _ = read([text[:length]], "length", tags=TAGS)
        assert "One.".startswith(texts.get("reasoning_content", ""))
        assert "Two.".startswith(texts.get("content", ""))


def test_tokens_of_thoughts_are_counted_with_their_tags() -> None:
    answer = Answer("tiny", True, METRICS, reasoning=TAGS)
    for pieces, expected in (
        (["<think>", "\n", "One", ".", "</think>", "\n\n", "Two", "."], 5),
        (["<th", "ink>", "One", "</th", "ink>", "Two"], 5),
        (["Two", "."], 0),
        (["<", "b>"], 0),
    ):
        reader = AnswerReader(answer, thinking=False)
        total = 0
        for text in pieces:
            reader.push(Piece(1, text, 1))
            total += reader.take_reasoning_tokens()
        assert total == expected, pieces
