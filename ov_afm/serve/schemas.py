"""JSON schemas before they become grammars: references, what several schemas say together, and what is refused.

A grammar says what may come next, so it cannot hold everything that a schema can say. What it cannot hold is refused
by name here and in `json_grammar`; nothing is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError

__all__ = [
    "ANNOTATIONS",
    "NUMBER_FORMATS",
    "REFUSED",
    "TYPES",
    "Schema",
    "SchemaError",
    "Schemas",
    "at",
    "merge",
    "types_of",
]

Schema = Mapping[str, Any] | bool
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
# What says nothing about which texts are allowed.
ANNOTATIONS = frozenset(
    ("$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples", "example")
    + ("deprecated", "readOnly", "writeOnly", "discriminator", "externalDocs", "xml", "markdownDescription")
    + ("enumDescriptions", "propertyOrdering")
)
# Standard keywords that no grammar can hold, with what to do instead.
REFUSED = {
    "not": "say what is allowed instead",
    "if": "use anyOf",
    "then": "use anyOf",
    "else": "use anyOf",
    "dependentRequired": "use anyOf",
    "dependentSchemas": "use anyOf",
    "dependencies": "use anyOf",
    "contains": "describe the items by items or prefixItems",
    "minContains": "describe the items by items or prefixItems",
    "maxContains": "describe the items by items or prefixItems",
    "unevaluatedProperties": "use additionalProperties",
    "unevaluatedItems": "use items",
    "additionalItems": "use prefixItems and items",
    "$anchor": "refer to it by its place, such as #/$defs/name",
    "$dynamicRef": "use $ref",
    "$dynamicAnchor": "use $ref",
    "$recursiveRef": "use $ref",
    "$recursiveAnchor": "use $ref",
    "contentEncoding": "use pattern",
    "contentMediaType": "leave it out",
    "contentSchema": "leave it out",
    "nullable": 'use a type such as ["string", "null"]',
}
OBJECTS = ("properties", "patternProperties")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
KEYWORDS = {
    "object": (*OBJECTS, "required", "additionalProperties", "propertyNames", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("pattern", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
GENERAL = ("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "format")
KNOWN = frozenset([*GENERAL, *(keyword for keywords in KEYWORDS.values() for keyword in keywords)])
NUMBER_FORMATS = ("int32", "int64", "float", "double")
MAX_DEPTH = 60
MAX_ALTERNATIVES = 256
HIGHEST = {"minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"}
LOWEST = {"maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"}


class SchemaError(ConfigError):
    """A schema that cannot be enforced.

    Attributes:
        place: Path of the keyword in the schema, such as `properties.age.multipleOf`; empty for the whole.
    """

    default_code = "schema-unusable"

    def __init__(self, message: str, place: str = "", *, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.place = place


def at(place: str, *keys: object) -> str:
    """The place of something within another."""
    return ".".join(filter(None, [place, *map(str, keys)]))


class Schemas:
    """A schema and what its references lead to.

    Args:
        root: The whole schema.
    """

    def __init__(self, root: Schema) -> None:
        self.root = root

    def resolve(self, reference: Any, place: str) -> Schema:
        """What a `$ref` leads to.

        Raises:
            SchemaError: Nowhere.
        """
        if not isinstance(reference, str) or not reference.startswith("#") or reference[1:2] not in ("", "/"):
            raise SchemaError(
                f"$ref must lead to a place in the same schema, such as #/$defs/name; found {reference!r}", place
            )
        node: Any = self.root
        for part in reference[2:].split("/") if len(reference) > 1 else ():
            key = part.replace("%25", "%").replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(key)] if isinstance(node, list) else node[key]
            except (KeyError, IndexError, ValueError, TypeError):
                raise SchemaError(f"$ref leads to {reference!r}, which is not there", place) from None
        if not isinstance(node, (dict, bool)):
            raise SchemaError(f"$ref leads to {reference!r}, which is no schema", place)
        return node

    def target(self, schema: Schema, place: str, depth: int = 0) -> Schema:
        """The same without a `$ref` at its top."""
        while isinstance(schema, dict) and "$ref" in schema:
            schema, depth = self.flat(self.resolve(schema["$ref"], at(place, "$ref")), place, depth + 1), depth + 1
        return schema

    def flat(self, schema: Schema, place: str, depth: int = 0) -> Schema:
        """The same without `allOf`, and without `$ref` beside anything that restricts it.

        Raises:
            SchemaError: A keyword is not known or cannot be joined with another.
        """
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise SchemaError(f"a schema is an object, true or false; found {json.dumps(schema)[:60]}", place)
        if depth > MAX_DEPTH:
            raise SchemaError("the schema is nested too deeply, or refers to itself without end", place)
        rest = {key: value for key, value in schema.items() if not _is_annotation(key)}
        check_keywords(rest, place, holds_enum="enum" in rest or "const" in rest)
        if set(rest) <= {"$ref"}:
            return rest or True
        parts: list[Schema] = []
        if "$ref" in rest:
            parts.append({"$ref": rest.pop("$ref")})
        several = rest.pop("allOf", ())
        parts += [self.flat(each, at(place, "allOf", index), depth + 1) for index, each in enumerate(several)]
        whole: Schema = rest or True
        for part in parts:
            whole = merge(self, whole, part, place, depth + 1)
        return whole


def _is_annotation(key: str) -> bool:
    return key in ANNOTATIONS or key.startswith("x-")


def check_keywords(schema: Mapping[str, Any], place: str, *, holds_enum: bool) -> None:
    """Refuse keywords that are unknown, cannot be enforced or have values of another form."""
    for key, value in schema.items():
        where = at(place, key)
        if key == "nullable" and value is False:
            continue
        # Of the values of an enum those that the schema refuses are left out, whatever refuses them.
        if key in REFUSED and not (holds_enum and key != "nullable" and not key.startswith("$")):
            raise SchemaError(f"{key} cannot be enforced; {REFUSED[key]}", where)
        if key not in KNOWN and key not in REFUSED:
            raise SchemaError(f"{key!r:.60} is no keyword that this server can enforce", where)
        for keys, is_right, form in FORMS:
            if key in keys and not is_right(value):
                raise SchemaError(f"{key} must be {form}, found {json.dumps(value)[:60]}", where)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_types(value: Any) -> bool:
    return bool(_listed(value)) and all(each in TYPES for each in _listed(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# What values of keywords must be.
FORMS: tuple[tuple[Sequence[str], Callable[[Any], bool], str], ...] = (
    (("type",), _is_types, f"among {', '.join(TYPES)}"),
    (COUNTS, lambda value: _is_number(value) and value >= 0 and value == int(value), "a whole number of at least 0"),
    (KEYWORDS["number"], _is_number, "a number"),
    (("pattern", "format"), lambda value: isinstance(value, str), "text"),
    (OBJECTS, lambda value: isinstance(value, dict), "an object of schemas"),
    (("enum",), lambda value: isinstance(value, list), "a list of values"),
    (("prefixItems", "allOf"), lambda value: isinstance(value, list), "a list of schemas"),
    (("anyOf", "oneOf"), lambda value: isinstance(value, list) and bool(value), "a list of schemas, not empty"),
    (("required",), _is_names, "a list of names"),
)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def types_of(schema: Mapping[str, Any]) -> list[str]:
    """The types that a schema names, or that its keywords are about; empty if any may come."""
    if "type" in schema:
        named = list(dict.fromkeys(_listed(schema["type"])))
        return [each for each in named if not (each == "integer" and "number" in named)]
    about = [kind for kind, keywords in KEYWORDS.items() if any(each in schema for each in keywords)]
    if not about and "format" in schema:
        return ["number" if schema["format"] in NUMBER_FORMATS else "string"]
    return about


def merge(schemas: Schemas, a: Schema, b: Schema, place: str, depth: int = 0) -> Schema:
    """A schema that allows what both allow.

    Raises:
        SchemaError: No grammar could say it.
    """
    if depth > MAX_DEPTH:
        raise SchemaError("the schema is nested too deeply, or refers to itself without end", place)
    if isinstance(a, bool) or isinstance(b, bool):
        return b if a is True else a if b is True else False
    if a == b:
        return a
    if "$ref" in a or "$ref" in b:
        a, b = schemas.target(a, place, depth + 1), schemas.target(b, place, depth + 1)
        return merge(schemas, a, b, place, depth + 1)
    joined: dict[str, Any] = dict(a)
    for key, value in b.items():
        joined[key] = _join(schemas, key, a[key], value, place, depth) if key in a and a[key] != value else value
    if "properties" in a or "properties" in b:
        joined["properties"] = _join_properties(schemas, a, b, place, depth)
    if "type" in joined and not joined["type"]:
        return False
    return joined


def _join(schemas: Schemas, key: str, a: Any, b: Any, place: str, depth: int) -> Any:
    if key == "type":
        return _join_types(_listed(a), _listed(b))
    if key in HIGHEST:
        return max(a, b)
    if key in LOWEST:
        return min(a, b)
    if key == "required":
        return list(dict.fromkeys([*a, *b]))
    if key == "properties":
        return None
    if key in ("additionalProperties", "items", "propertyNames"):
        where = at(place, key)
        return merge(schemas, schemas.flat(a, where, depth + 1), schemas.flat(b, where, depth + 1), where, depth + 1)
    if key == "enum":
        return [each for each in a if any(json.dumps(each) == json.dumps(other) for other in b)]
    if key == "uniqueItems":
        return a or b
    if key == "anyOf" and len(a) * len(b) <= MAX_ALTERNATIVES:
        return [{"allOf": [x, y]} for x in a for y in b]
    raise SchemaError(f"two different {key} cannot be enforced together; write them as one", at(place, key))


def _join_types(a: Sequence[str], b: Sequence[str]) -> list[str]:
    types = [each for each in a if each in b or (each == "integer" and "number" in b)]
    return types + [each for each in b if each == "integer" and "number" in a and each not in types]


def _join_properties(
    schemas: Schemas, a: Mapping[str, Any], b: Mapping[str, Any], place: str, depth: int
) -> dict[str, Schema]:
    properties: dict[str, Schema] = {}
    for name in dict.fromkeys([*a.get("properties", {}), *b.get("properties", {})]):
        each = [part.get("properties", {}).get(name, part.get("additionalProperties", True)) for part in (a, b)]
        where = at(place, "properties", name)
        known = [one for one in each if one is not True]
        if len(known) < 2 or known[0] == known[1]:
            properties[name] = known[0] if known else True
        else:
            one, other = (schemas.flat(one, where, depth + 1) for one in each)
            properties[name] = merge(schemas, one, other, where, depth + 1)
    return properties
