"""What the server does with each keyword of JSON Schema; `docs/schemas.md` is made of it.

A case that is enforced has values that its schema allows and the grammar writes, and values that the schema refuses;
all are tried by `tests/serve/test_json_grammar.py`. A case that is refused names the place of the keyword. Write the
page again: `PYTHONPATH=tests .venv/bin/python -m support.schema_cases > docs/schemas.md`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "Case", "page"]


@dataclass(frozen=True, slots=True)
class Case:
    """A keyword, or a use of one.

    Attributes:
        name: The keyword.
        schema: A schema that uses it.
        valid: Values that the grammar writes.
        invalid: Values that it never writes.
        refused: Place of the keyword, for a schema that is refused.
        note: What there is to know about it.
    """

    name: str
    schema: Mapping[str, Any] | bool
    valid: Sequence[Any] = ()
    invalid: Sequence[Any] = ()
    refused: str = ""
    note: str = ""


NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#"}}}}
KINDS = [
    {"type": "object", "properties": {"k": {"const": "a"}, "x": {"type": "integer"}}, "required": ["k", "x"]},
    {"type": "object", "properties": {"k": {"const": "b"}, "y": {"type": "string"}}, "required": ["k"]},
]
CASES: dict[str, list[Case]] = {
    "Any type": [
        Case("type", {"type": ["integer", "null"]}, [7, None], ["a", 1.5], note="one or a list"),
        Case("type left out", {"minimum": 3}, [3], [2], note="the types that the other keywords are about"),
        Case("true", True, [{"a": [1, "b", None]}], [], note="any JSON"),
        Case(
            "enum",
            {"enum": ["a", 1, {"x": [2]}]},
            ["a", 1, {"x": [2]}],
            ["b"],
            note="values that the rest refuses are left out",
        ),
        Case("enum with type", {"type": "string", "enum": ["a", 1]}, ["a"], [1]),
        Case("const", {"const": 'q"uote\nü😀'}, ['q"uote\nü😀'], ["q"]),
        Case("anyOf", {"anyOf": [{"type": "integer"}, {"enum": ["a"]}]}, [1, "a"], ["b"]),
        Case("anyOf with siblings", {"type": "integer", "anyOf": [{"minimum": 5}, {"const": 1}]}, [1, 5], [2, "a"]),
        Case(
            "oneOf",
            {"oneOf": KINDS},
            [{"k": "a", "x": 1}, {"k": "b"}],
            [{"k": "b", "x": 1}],
            note="where no value can fit two: other types, or a required property with other values",
        ),
        Case("oneOf of schemas that overlap", {"oneOf": [{"type": "integer"}, {"minimum": 2}]}, refused="oneOf"),
        Case(
            "allOf", {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]}, [3, 5], [2, 6]
        ),
        Case(
            "$ref, $defs, definitions",
            {"$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}},
            [None],
            [1],
            note="within the schema, also to itself",
        ),
        Case("$ref with siblings", {"$ref": "#/$defs/n", "minimum": 2, "$defs": {"n": {"type": "integer"}}}, [2], [1]),
        Case("$ref elsewhere", {"$ref": "https://example.com/x"}, refused="$ref"),
        Case("not", {"not": {"type": "string"}}, refused="not"),
        Case("if, then, else", {"if": {"type": "string"}, "then": {}}, refused="if"),
        Case("$anchor, $dynamicRef", {"$anchor": "a"}, refused="$anchor"),
        Case("nullable", {"type": "string", "nullable": True}, refused="nullable"),
        Case("unknown keywords", {"type": "string", "frob": 1}, refused="frob"),
        Case(
            "annotations",
            {"type": "null", "title": "t", "description": "d", "default": 1, "examples": [], "x-y": 1},
            [None],
            [1],
            note="title, description, default, examples, deprecated, readOnly, writeOnly, $comment, $schema, "
            "$id, discriminator, x-…: accepted, they allow and forbid nothing",
        ),
    ],
    "Objects": [
        Case(
            "properties, required",
            {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}}, "required": ["b"]},
            [{"a": 1, "b": None}, {"b": None}],
            [{"a": 1}, {"b": 1}],
            note="in the schema's order",
        ),
        Case("required without properties", {"type": "object", "required": ["city"]}, [{"city": "x"}], [{}]),
        Case(
            "additionalProperties: false",
            {"type": "object", "properties": {"a": {}}, "additionalProperties": False},
            [{}, {"a": 1}],
            [{"b": 1}],
        ),
        Case(
            "additionalProperties: a schema",
            {"type": "object", "additionalProperties": {"type": "integer"}},
            [{}, {"x": 1, "y": 2}],
            [{"x": "a"}],
            note="beside `properties` no other keys are written",
        ),
        Case(
            "propertyNames",
            {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "null"}},
            [{"ab": None}],
            [{"A": None}],
        ),
        Case(
            "patternProperties",
            {"type": "object", "patternProperties": {"^x_": {"type": "null"}}},
            [{"x_1": None}],
            [{"x_1": 1}],
            note="one pattern, without properties",
        ),
        Case(
            "patternProperties with properties",
            {"type": "object", "properties": {"a": {}}, "patternProperties": {"^x": {}}},
            refused="patternProperties",
        ),
        Case(
            "minProperties, maxProperties",
            {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "minProperties": 2, "maxProperties": 2},
            [{"a": 1, "c": 1}],
            [{"a": 1}, {"a": 1, "b": 1, "c": 1}],
        ),
        Case("minProperties above 1 for any keys", {"type": "object", "minProperties": 2}, refused="minProperties"),
        Case(
            "dependentRequired, dependentSchemas",
            {"type": "object", "dependentRequired": {"a": ["b"]}},
            refused="dependentRequired",
        ),
        Case(
            "unevaluatedProperties", {"type": "object", "unevaluatedProperties": False}, refused="unevaluatedProperties"
        ),
    ],
    "Arrays": [
        Case("items", {"type": "array", "items": {"type": "integer"}}, [[], [1, 2]], [["a"]]),
        Case("items: false", {"type": "array", "items": False}, [[]], [[1]]),
        Case(
            "prefixItems",
            {"type": "array", "prefixItems": [{"type": "null"}, {"type": "integer"}], "items": False, "minItems": 2},
            [[None, 1]],
            [[1, None], [None]],
        ),
        Case(
            "minItems, maxItems",
            {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
            [[1, 2], [1, 2, 3]],
            [[1], [1, 2, 3, 4]],
            note="a maxItems above 2048 is left to the validation at the end",
        ),
        Case("uniqueItems", {"type": "array", "uniqueItems": True}, refused="uniqueItems", note="false is accepted"),
        Case("contains, minContains, maxContains", {"type": "array", "contains": {"type": "null"}}, refused="contains"),
        Case("items: a list, additionalItems", {"type": "array", "items": [{"type": "null"}]}, refused="items"),
        Case("unevaluatedItems", {"type": "array", "unevaluatedItems": False}, refused="unevaluatedItems"),
    ],
    "Text": [
        Case(
            "minLength, maxLength",
            {"type": "string", "minLength": 2, "maxLength": 40},
            ["ab", "ü😀", "x" * 40, 'a"\n'],
            ["a", "x" * 41],
            note="characters; a maxLength above 2048 is left to the validation at the end",
        ),
        Case(
            "pattern",
            {"type": "string", "pattern": '^["\\\\a]{1,4}$'},
            ['"\\a"'],
            ["b", '"""""'],
            note="regular expressions of ECMA 262 without looking around, references "
            "and flags; searched for unless ^ and $ bind them",
        ),
        Case("pattern without anchors", {"type": "string", "pattern": "cat|dog$"}, ["a cat!", "dog"], ["dog!", "bird"]),
        Case(
            "pattern with a length",
            {"type": "string", "pattern": "^[a-z]+$", "maxLength": 4},
            ["abcd"],
            ["abcde", "A"],
            note="where one place of the pattern takes up the length",
        ),
        Case("pattern that looks around", {"type": "string", "pattern": "^(?=a)"}, refused="pattern"),
        Case(
            "pattern that repeats a repetition", {"type": "string", "pattern": "^([a-z]{1,9}){1,9}$"}, refused="pattern"
        ),
        Case("pattern with a format", {"type": "string", "pattern": "^a", "format": "date"}, refused="pattern"),
        Case("format: date", {"format": "date"}, ["2024-02-29", "1999-12-31"], ["2023-02-29", "2024-13-01"]),
        Case("format: time", {"format": "time"}, ["23:59:59Z", "01:02:03.5+01:00"], ["24:00:00Z"]),
        Case("format: date-time", {"format": "date-time"}, ["2024-02-29T12:00:00Z"], ["2024-02-29"]),
        Case("format: duration", {"format": "duration"}, ["P3D", "PT1H30M"], ["1h"]),
        Case("format: uuid", {"format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123e4567"]),
        Case("format: email", {"format": "email"}, ["ada.l@example.org"], ["ada"]),
        Case("format: hostname", {"format": "hostname"}, ["a.example.org"], ["-a"]),
        Case("format: ipv4", {"format": "ipv4"}, ["192.168.0.1"], ["256.1.1.1"]),
        Case(
            "format: uri",
            {"format": "uri"},
            ["https://example.org:8080/a?b=c"[:24]],
            ["x y"],
            note="web addresses only",
        ),
        Case("other formats", {"format": "ipv6"}, refused="format"),
        Case(
            "contentEncoding, contentMediaType",
            {"type": "string", "contentEncoding": "base64"},
            refused="contentEncoding",
        ),
    ],
    "Numbers": [
        Case(
            "minimum, maximum",
            {"type": "integer", "minimum": -12, "maximum": 1040},
            [-12, 0, 7, 999, 1040],
            [-13, 1041, 1.5],
        ),
        Case(
            "exclusiveMinimum, exclusiveMaximum",
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            [0.5, 0.001],
            [0, 1, -0.5, 2],
        ),
        Case(
            "bounds of numbers",
            {"type": "number", "minimum": -1.5, "maximum": 2.5},
            [-1.5, 0, 2.5, 1.25],
            [-1.6, 2.51],
            note="written without an exponent, with up to 15 digits",
        ),
        Case(
            "multipleOf with bounds",
            {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
            [0, 21, 98],
            [1, 105],
            note="whole numbers, with up to 512 multiples between the bounds",
        ),
        Case("multipleOf alone", {"type": "integer", "multipleOf": 7}, refused="multipleOf"),
        Case("format: int32, int64, float, double", {"type": "integer", "format": "int32"}, [2**31 - 1], [2**31]),
    ],
}

HEAD = """# Schemas

An answer follows a JSON schema where a request has one: `response_format` (`json_schema`, or `json_object` with or
without `schema`), `guided_json` and `structured_outputs` (vLLM's names), and the parameters of `tools`.
`guided_regex`, `guided_choice` and `guided_grammar` (XGrammar's EBNF) give the same for text that is no JSON.

The server translates a schema to a grammar (`ov_afm/serve/json_grammar.py`), and the engine can only choose tokens
that the grammar allows. The grammar never allows what the schema forbids. It may allow less:

- Properties come in the order of the schema; keys that the schema does not name are written only where it names none.
- White space is one blank, or a line break and an indentation of up to 20 characters.
- Numbers without bounds have up to 16 digits before the point.

One thing it leaves open: a `maxLength`, `maxItems` or `maxProperties` above 2048 is checked when the answer is
complete.

**What a grammar cannot hold is refused** with status 400, code `schema_unsupported`, and the place of the keyword,
such as `response_format.json_schema.schema.properties.age.multipleOf`. Nothing is dropped. Before an answer ends with
`stop`, the server validates it by [jsonschema-rs](https://pypi.org/project/jsonschema-rs/), code that has no part in
the grammar; an answer that fails is an error with code `schema_violated`, in a stream as an event. Answers that end
for want of tokens (`length`) or at a stop string of the request are not whole, so they are not validated.

A grammar that is new is first compiled in a process of its own, while other requests pass. One that takes more than 8
seconds of processor time, or more than 200 ms for a token, is refused (400, `grammar_too_slow`), and so is every
further request for it, at once. The engine keeps 64 compiled grammars and the server remembers 1024 results.

## Keywords

This table is generated from `tests/support/schema_cases.py`; each row is a test. An example shows a value that can be
written, and one that cannot.
"""


def page() -> str:
    """The text of `docs/schemas.md`."""
    lines = [HEAD]
    for area, cases in CASES.items():
        lines += [f"### {area}\n", "| Keyword | | Written | Never written | |", "|---|---|---|---|---|"]
        for case in cases:
            shown = [_cell(case.valid), _cell(case.invalid)]
            lines.append(
                f"| {case.name} | {'refused' if case.refused else 'enforced'} | {' | '.join(shown)} | {case.note} |"
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _cell(values: Sequence[Any]) -> str:
    if not values:
        return ""
    text = json.dumps(values[0], ensure_ascii=False).replace("|", "\\|")
    return f"`{text}`" if len(text) <= 45 else f"`{text[:40]}…`"


if __name__ == "__main__":
    sys.stdout.write(page())
