"""From schemas to grammars: what is enforced is, what is not is refused by name, and docs/schemas.md says so."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jsonschema_rs
import pytest
from hypothesis import given, settings
from support import schema_cases
from support.ebnf import accepts
from support.schema_cases import Case

from ov_afm.serve.ebnf import Chars, Rules
from ov_afm.serve.json_grammar import json_grammar
from ov_afm.serve.json_validation import mistake
from ov_afm.serve.number_grammar import number
from ov_afm.serve.patterns import Pattern, PatternError
from ov_afm.serve.schemas import SchemaError

ROOT = Path(__file__).parents[2]
EVERY = [case for cases in schema_cases.CASES.values() for case in cases]
ENFORCED = [case for case in EVERY if not case.refused]
REFUSED = [case for case in EVERY if case.refused]


def grammar_of(schema: Any) -> str:
    return json_grammar(json.dumps(schema))


@pytest.mark.parametrize("case", ENFORCED, ids=lambda case: case.name)
def test_a_keyword_is_enforced(case: Case) -> None:
    grammar = grammar_of(case.schema)
    validator = jsonschema_rs.Draft202012Validator(case.schema, validate_formats=True)
    for value in case.valid:
        assert validator.is_valid(value), "the case is wrong"
        for layout in ({}, {"separators": (",", ":")}, {"indent": 2}):
            text = json.dumps(value, ensure_ascii=False, **layout)
            assert accepts(grammar, text), text
    for value in case.invalid:
        assert not accepts(grammar, json.dumps(value)), value


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_a_keyword_that_no_grammar_holds_is_refused_by_name(case: Case, nested: bool) -> None:
    schema = {"type": "object", "properties": {"x": case.schema}} if nested else case.schema
    with pytest.raises(SchemaError) as caught:
        grammar_of(schema)
    assert caught.value.place == ("properties.x." if nested else "") + case.refused
    assert "\n" not in str(caught.value)


def test_the_page_says_what_was_tried() -> None:
    """Write it again with `PYTHONPATH=tests python -m support.schema_cases > docs/schemas.md`."""
    assert (ROOT / "docs" / "schemas.md").read_text(encoding="utf-8") == schema_cases.page()


@pytest.mark.parametrize(
    "schema",
    [False, {"$ref": "#"}, {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}]
    + [{"allOf": [{"type": "string"}, {"type": "null"}]}, {"type": "integer", "minimum": 3, "maximum": 2}]
    + [{"type": "string", "enum": [1]}, {"type": "array", "items": False, "minItems": 1}],
    ids=str,
)
def test_a_schema_that_nothing_fits_is_refused(schema: Any) -> None:
    with pytest.raises(SchemaError):
        grammar_of(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"$ref": "#/nowhere"},
        {"type": "string", "minLength": -1},
        {"type": "string", "minLength": 1e9},
        {"minimum": "a"},
        {"properties": []},
        {"required": "a"},
        {"anyOf": []},
        {"properties": {"a": 1}},
        {"exclusiveMinimum": True, "minimum": 1},
        {"minimum": float("inf")},
        {"allOf": [{"pattern": "a"}, {"pattern": "b"}]},
        {"oneOf": 3},
    ],
    ids=str,
)
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(SchemaError):
        grammar_of(schema)


def test_a_schema_that_is_nested_without_end_is_refused() -> None:
    schema: Any = {"type": "null"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    with pytest.raises(SchemaError, match="nested too deeply"):
        grammar_of(schema)


def test_white_space_has_a_bound() -> None:
    grammar = grammar_of({"type": "object", "properties": {"a": {}}, "required": ["a"]})
    assert accepts(grammar, '{\n        "a": 1\n}')
    for text in (
        '{  "a": 1}',
        '{"a":  1}',
        '{"a": 1}\n',
        ' {"a": 1}',
        "{" + "\n" * 2 + '"a": 1}',
        "{\n" + " " * 21 + '"a": 1}',
    ):
        assert not accepts(grammar, text), text


def test_a_mistake_in_an_answer_is_found() -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 2}}})
    assert mistake('{"a": 2}', schema) is None
    assert mistake('{"a": 3}', schema) == "a: 3 is not a multiple of 2"
    assert "not JSON" in str(mistake('{"a": 2', schema))


bounds = st.none() | st.decimals(-3000, 3000, places=3) | st.integers(-3000, 3000).map(Decimal)


@settings(max_examples=100, deadline=None)
@given(bounds, bounds, st.booleans(), st.booleans(), st.decimals(-3000, 3000, places=3), st.data())
def test_numbers_are_within_their_bounds(
    low: Decimal | None, high: Decimal | None, low_out: bool, high_out: bool, value: Decimal, data: st.DataObject
) -> None:
    near = [bound for bound in (low, high) if bound is not None]
    if near:
        value = data.draw(st.sampled_from(near)) + data.draw(
            st.sampled_from([Decimal(0), Decimal("0.001"), Decimal(-1), value])
        )
    text = f"{value.normalize():f}" if value else "0"
    rules = Rules()
    node = number(low, high, low_out=low_out and low is not None, high_out=high_out and high is not None)
    allowed = (low is None or value > low or (value == low and not low_out)) and (
        high is None or value < high or (value == high and not high_out)
    )
    assert (rules.productive(node) and accepts(rules.render(node), text)) == allowed


PATTERNS = [
    "a*b?",
    "(a|b)c{2,3}",
    "[^a-c]x",
    r"\d+\.\d{2}",
    r"^[\w.]+@x$",
    "a|^b$",
    "(ab)+c",
    ".",
    r'"\\',
    r"\u0041é",
    "x{0}",
    "[]a",
    "a{,2}",
]


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=st.text(alphabet='abcx1.@"\\A\n éü', max_size=6))
@settings(max_examples=30, deadline=None)
def test_patterns_match_what_they_match_elsewhere(pattern: str, text: str) -> None:
    try:
        grammar = grammar_of({"type": "string", "pattern": pattern})
    except SchemaError:
        assert pattern in ("[]a", "a{,2}")
        return
    assert accepts(grammar, json.dumps(text, ensure_ascii=False)) == bool(
        re.search(pattern.replace("$", r"\Z"), text, re.A)
    )


@pytest.mark.parametrize(
    "pattern", ["(?!a)", "(?i)a", r"a\b", r"(a)\1", "a**", "(a", "a)", "[a", r"\p{L}", "a^b", "[b-a]", "a{5,2}"]
)
def test_patterns_that_no_grammar_follows_are_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        Pattern(pattern)


points = st.integers(0, 0xD7FF) | st.integers(0xE000, 0x10FFFF)


@given(points, points)
@settings(max_examples=100, deadline=None)
def test_characters_are_ranges_of_bytes(one: int, other: int) -> None:
    chars = Chars.of([(min(one, other), max(one, other))])
    parts = [pair for pair in re.findall(r"(\\u\w{4}|\\U\w{8}|[^\\\]-])(?:-(\\u\w{4}|\\U\w{8}|\w))?", chars.ebnf[1:-1])]
    covered = []
    for low, high in parts:
        ends = [int(each[2:], 16) if each.startswith("\\") else ord(each) for each in (low, high or low)]
        first, last = (chr(each).encode() for each in ends)
        assert len(first) == len(last)
        differs = next((index for index in range(len(first)) if first[index] != last[index]), len(first))
        assert all(pair == (0x80, 0xBF) for pair in zip(first[differs + 1 :], last[differs + 1 :], strict=True))
        covered.append((ends[0], ends[1]))
    assert Chars.of(covered) == chars
