"""From a JSON schema to a grammar whose texts are all valid by the schema.

XGrammar's own way from a schema to a grammar drops what it does not know and has errors in what it does (0.1.31:
numbers with bounds, patterns with quotation marks, white space without end). So schemas are translated here. The
grammar may allow less than the schema: properties come in the schema's order, keys beyond `properties` are not
written, white space is one blank, or a line break with an indentation. It never allows more; what it cannot hold is
refused by name.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from ..errors import ConfigError
from .ebnf import ANY, NOTHING, Alt, Node, Raw, Ref, Rules, Seq, literal
from .number_grammar import integer, number
from .patterns import FORMATS, Pattern, PatternError
from .schemas import NUMBER_FORMATS, TYPES, Schema, SchemaError, Schemas, at, merge, types_of

__all__ = ["json_grammar"]

# After an opening bracket or a comma, and before a closing bracket; llama.cpp's grammars have the same bound.
SPACE = Alt((Raw('""'), Raw('" "'), Raw(r'"\n" [ \t]{0,20}')))
COLON = Raw('":" " "?')
MAX_COUNT = 2048
MAX_RULES = 20_000
# Properties times allowed numbers of them.
MAX_COUNTED = 4096
INT_FORMATS = {"int32": 2**31, "int64": 2**63}


@functools.lru_cache(maxsize=64)
def json_grammar(schema: str) -> str:
    """The grammar of the JSON texts that a schema allows.

    Args:
        schema: JSON text.

    Returns:
        EBNF whose first rule is `root`.

    Raises:
        SchemaError: A keyword cannot be enforced, or nothing fits the schema.
    """
    root: Schema = json.loads(schema)
    translator = _Translator(root)
    node = translator.value(root, "")
    rules = translator.rules
    if not rules.productive(node):
        raise SchemaError("no JSON text fits the schema")
    return rules.render(node)


class _Translator:
    def __init__(self, root: Schema) -> None:
        self._schemas = Schemas(root)
        self.rules = Rules()
        self._references: dict[str, Ref] = {}
        self._depth = 0
        self._space = self.rules.define(SPACE, "space")

    def value(self, schema: Schema, place: str) -> Node:
        """The texts of a schema."""
        if len(self.rules) > MAX_RULES:
            raise SchemaError("the schema is too large to be enforced; leave something out", place)
        self._depth += 1
        if self._depth > 100:
            raise SchemaError("the schema is nested too deeply, or refers to itself without end", place)
        flat = self._schemas.flat(schema, place)
        node = (
            self._reference(flat["$ref"], place)
            if isinstance(flat, dict) and "$ref" in flat
            else self._flat(flat, place)
        )
        self._depth -= 1
        return self.rules.define(node, "v") if isinstance(node, Alt) and node.items else node

    def _reference(self, reference: str, place: str) -> Ref:
        if reference not in self._references:
            target = self._schemas.resolve(reference, at(place, "$ref"))
            rule = self._references[reference] = self.rules.reserve("ref")
            self.rules.fill(rule, self.value(target, reference.lstrip("#/").replace("/", ".")))
        return self._references[reference]

    def _flat(self, schema: Schema, place: str) -> Node:
        if isinstance(schema, bool):
            return self._anything() if schema else NOTHING
        if "enum" in schema or "const" in schema:
            return self._listed(schema, place)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._alternatives(key, schema, place)
        if "format" in schema and schema["format"] not in FORMATS and schema["format"] not in NUMBER_FORMATS:
            known = ", ".join(sorted(FORMATS))
            message = f"format {json.dumps(schema['format'])[:60]} cannot be enforced; formats are {known}"
            raise SchemaError(message, at(place, "format"))
        kinds = types_of(schema)
        return Alt([self._typed(kind, schema, place) for kind in kinds]) if kinds else self._anything()

    def _typed(self, kind: str, schema: Mapping[str, Any], place: str) -> Node:
        if kind in ("number", "integer"):
            return _number(schema, kind, place)
        if kind == "string":
            return self._string(schema, place)
        if kind == "array":
            return self._array(schema, place)
        if kind == "object":
            return self._object(schema, place)
        return literal("null") if kind == "null" else Alt((literal("true"), literal("false")))

    def _anything(self) -> Node:
        if "" not in self._references:
            rule = self._references[""] = self.rules.reserve("any")
            self.rules.fill(rule, Alt([self._typed(kind, {}, "") for kind in TYPES if kind != "integer"]))
        return self._references[""]

    # -- Values that are listed, alternatives

    def _listed(self, schema: Mapping[str, Any], place: str) -> Node:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        allowed = [value for value in values if self._is_valid(value, schema, place)]
        return Alt([self._constant(value) for value in allowed])

    def _is_valid(self, value: Any, schema: Mapping[str, Any], place: str) -> bool:
        from .json_validation import validator

        root = self._schemas.root
        definitions = {key: root[key] for key in ("$defs", "definitions") if isinstance(root, dict) and key in root}
        try:
            return bool(validator({**definitions, **schema}).is_valid(value))
        except ValueError as error:
            raise SchemaError(f"the values cannot be checked: {error}", place) from error

    def _constant(self, value: Any) -> Node:
        if isinstance(value, dict):
            members = [Seq((self._key(key), self._constant(each))) for key, each in value.items()]
            return self._enclosed("{", members, "}")
        if isinstance(value, list):
            return self._enclosed("[", [self._constant(each) for each in value], "]")
        return literal(json.dumps(value, ensure_ascii=False))

    def _enclosed(self, begin: str, members: Sequence[Node], end: str) -> Node:
        inner = [part for member in members for part in (literal(","), self._space, member)][1:]
        return Seq((literal(begin), *inner, *([self._space] if members else []), literal(end)))

    def _key(self, name: str) -> Node:
        return Seq((literal(json.dumps(name, ensure_ascii=False)), COLON))

    def _alternatives(self, key: str, schema: Mapping[str, Any], place: str) -> Node:
        rest = {name: value for name, value in schema.items() if name != key}
        where = at(place, key)
        each = [self._schemas.flat(one, at(where, index)) for index, one in enumerate(schema[key])]
        if key == "oneOf":
            targets = [self._schemas.target(one, at(where, index)) for index, one in enumerate(each)]
            for (i, a), (j, b) in itertools.combinations(enumerate(targets), 2):
                if not self._apart(a, b, where):
                    message = f"oneOf cannot be enforced where two may hold at once, here {i} and {j}; use anyOf"
                    raise SchemaError(message, where)
        nodes = []
        for index, one in enumerate(each):
            spot = at(where, index)
            nodes.append(self.value(merge(self._schemas, one, rest, spot) if rest else one, spot))
        return Alt(nodes)

    def _apart(self, a: Schema, b: Schema, place: str) -> bool:
        """Whether no value can fit both."""
        if isinstance(a, bool) or isinstance(b, bool):
            return a is False or b is False
        for one, other in ((a, b), (b, a)):
            values = [one["const"]] if "const" in one else one.get("enum")
            if values is not None:
                return not any(self._is_valid(value, other, place) for value in values)
        kinds = [{"number" if each == "integer" else each for each in types_of(one)} for one in (a, b) if "type" in one]
        if len(kinds) == 2 and not kinds[0] & kinds[1]:
            return True
        if len(kinds) < 2 or kinds != [{"object"}, {"object"}]:
            return False
        shared = set(a.get("required", ())) & set(b.get("required", ()))
        for name in shared & a.get("properties", {}).keys() & b.get("properties", {}).keys():
            x, y = (self._schemas.target(self._schemas.flat(one["properties"][name], place), place) for one in (a, b))
            listed = any(isinstance(one, dict) and ("const" in one or "enum" in one) for one in (x, y))
            if listed and self._apart(x, y, place):
                return True
        # What one demands and the other has no room for.
        return any(
            one.get("additionalProperties") is False
            and set(other.get("required", ())) - one.get("properties", {}).keys()
            for one, other in ((a, b), (b, a))
        )

    # -- Strings

    def _string(self, schema: Mapping[str, Any], place: str) -> Node:
        least, most = _counts(schema, "Length", place)
        if most is not None and most < least:
            return NOTHING
        form = schema.get("format")
        if form in NUMBER_FORMATS:
            raise SchemaError(f"format {form} is for numbers and cannot be enforced for text", at(place, "format"))
        if form is None and "pattern" not in schema:
            return Seq((literal('"'), self.rules.text(ANY, least, most, '"')))
        where = at(place, "pattern" if "pattern" in schema else "format")
        if form is not None and "pattern" in schema:
            raise SchemaError("pattern and format cannot be enforced together; leave one of the two out", where)
        try:
            pattern = Pattern(FORMATS[form], whole=True) if form is not None else Pattern(schema["pattern"])
            pattern.bounded(least, most)
        except PatternError as error:
            raise SchemaError(f"the pattern cannot be enforced: {error}", where) from error
        return Seq((literal('"'), pattern.node(self.rules, '"')))

    # -- Arrays

    def _array(self, schema: Mapping[str, Any], place: str) -> Node:
        least, most = _counts(schema, "Items", place)
        if isinstance(schema.get("items"), list):
            raise SchemaError("a list of items cannot be enforced; use prefixItems", at(place, "items"))
        if schema.get("uniqueItems") and most not in (0, 1):
            raise SchemaError("uniqueItems cannot be enforced; leave it out", at(place, "uniqueItems"))
        first = [self.value(each, at(place, "prefixItems", i)) for i, each in enumerate(schema.get("prefixItems", ()))]
        item = self.value(schema.get("items", True), at(place, "items"))
        if not self.rules.productive(item) and item == NOTHING:
            most = len(first) if most is None else min(most, len(first))
        if most is not None and most < least:
            return NOTHING
        end = Seq((self._space, literal("]")))
        # What may follow after so many items, from the last place on.
        places = max(least, len(first)) if most is None else most
        more: Node = self._repeated(item, end) if most is None else self.rules.define(end, "end")
        for index in range(places - 1, 0, -1):
            one = first[index] if index < len(first) else item
            next_one = Seq((literal(","), self._space, one, more))
            more = self.rules.define(next_one if index < least else Alt((end, next_one)), "items")
        start: Node = Seq((self._space, first[0] if first else item, more))
        if places == 0 and most is not None:
            return literal("[]")
        return Seq((literal("["), start if least else Alt((literal("]"), start))))

    def _repeated(self, item: Node, end: Node) -> Node:
        rule = self.rules.reserve("items")
        self.rules.fill(rule, Alt((end, Seq((literal(","), self._space, item, rule)))))
        return rule

    # -- Objects

    def _object(self, schema: Mapping[str, Any], place: str) -> Node:
        least, most = _counts(schema, "Properties", place)
        more, required = schema.get("additionalProperties", True), list(dict.fromkeys(schema.get("required", ())))
        properties = dict(schema.get("properties", {}))
        if "patternProperties" in schema and (properties or required):
            where = at(place, "patternProperties")
            raise SchemaError("patternProperties cannot be enforced beside properties or required", where)
        for name in required:
            properties.setdefault(name, more)
        if not properties:
            return self._map(schema, more, place)
        if "propertyNames" in schema:
            names = schema["propertyNames"]
            properties = {
                key: each for key, each in properties.items() if self._named(key, names, place) or key in required
            }
            if not all(self._named(key, names, place) for key in required):
                return NOTHING
        members: list[tuple[Node, bool]] = []
        for name, each in properties.items():
            node = self.value(each, at(place, "properties", name))
            if node == NOTHING and name in required:
                return NOTHING
            if node != NOTHING:
                members.append((Seq((self._key(name), node)), name in required))
        return self._members(members, least, len(members) if most is None else min(most, len(members)), place)

    def _named(self, name: str, schema: Schema, place: str) -> bool:
        return self._is_valid(name, {"allOf": [schema]}, at(place, "propertyNames"))

    def _members(self, members: Sequence[tuple[Node, bool]], least: int, most: int, place: str) -> Node:
        """Members in their order, from `least` to `most` of them."""
        needed = sum(required for _, required in members)
        if most < max(least, needed):
            return NOTHING
        # Only where it matters how many there were are they counted.
        counts = least > needed or most < len(members)
        if counts and len(members) * (most + 1) > MAX_COUNTED:
            message = f"numbers of properties are enforced for up to {MAX_COUNTED} properties times their number"
            raise SchemaError(message, at(place, "minProperties" if least > needed else "maxProperties"))
        end = Seq((self._space, literal("}")))
        open_after = list(itertools.accumulate(reversed([required for _, required in members]), initial=0))[::-1]

        @functools.cache
        def following(index: int, count: int) -> Node:
            """A member at `index` or later, without the comma."""
            if index == len(members) or (counts and count >= most):
                return NOTHING
            node, required = members[index]
            here = Seq((node, after(index + 1, count + 1 if counts else 0)))
            return self.rules.define(here if required else Alt((here, following(index + 1, count))), "member")

        @functools.cache
        def after(index: int, count: int) -> Node:
            """What may come after a member."""
            more = following(index, count)
            next_one = Seq((literal(","), self._space, more))
            if open_after[index] or (counts and count < least):
                return self.rules.define(next_one, "more") if more != NOTHING else NOTHING
            return self.rules.define(Alt((end, next_one)) if more != NOTHING else end, "more")

        # From the last to the first, so that the calls do not nest.
        for index in range(len(members), -1, -1):
            for count in range(most + 1 if counts else 1):
                after(index, count)
                following(index, count)
        start = Seq((self._space, following(0, 0)))
        empty = not needed and not least
        return Seq((literal("{"), Alt((literal("}"), start)) if empty else start))

    def _map(self, schema: Mapping[str, Any], more: Schema, place: str) -> Node:
        """An object whose keys the schema does not name."""
        least, most = _counts(schema, "Properties", place)
        if least > 1:
            raise SchemaError("minProperties above 1 needs named properties", at(place, "minProperties"))
        key: Node = Seq((literal('"'), self.rules.text(ANY, 0, None, '"')))
        patterns = schema.get("patternProperties", {})
        if len(patterns) > 1 or (patterns and "propertyNames" in schema):
            where = at(place, "patternProperties")
            raise SchemaError("only one pattern of keys can be enforced, without propertyNames", where)
        for pattern, value in patterns.items():
            where = at(place, "patternProperties", pattern)
            key, more = self._string({"pattern": pattern}, where), value
        if "propertyNames" in schema:
            where = at(place, "propertyNames")
            key = self.value(
                merge(self._schemas, self._schemas.flat(schema["propertyNames"], where), {"type": "string"}, where),
                where,
            )
        value = self.value(more, at(place, "additionalProperties"))
        if most == 0 or value == NOTHING or key == NOTHING:
            return literal("{}") if not least else NOTHING
        member = Seq((key, COLON, value))
        end = Seq((self._space, literal("}")))
        rest: Node = self._repeated(member, end) if most is None else self.rules.define(end, "end")
        for _ in range((most or 1) - 1):
            rest = self.rules.define(Alt((end, Seq((literal(","), self._space, member, rest)))), "members")
        start = Seq((self._space, member, rest))
        return Seq((literal("{"), start if least else Alt((literal("}"), start))))


def _counts(schema: Mapping[str, Any], what: str, place: str) -> tuple[int, int | None]:
    """Least and most of something; a highest number that no grammar can count to is left to the check at the end."""
    # A schema may write 3 as 3.0.
    least, most = (
        None if each is None else int(each) for each in (schema.get(f"min{what}", 0), schema.get(f"max{what}"))
    )
    assert least is not None
    if least > MAX_COUNT:
        key = f"min{what}"
        raise SchemaError(f"{key} is {least}, at most {MAX_COUNT} is allowed", at(place, key))
    return least, None if most is not None and most > MAX_COUNT else most


def _number(schema: Mapping[str, Any], kind: str, place: str) -> Node:
    def bound(key: str, choose: Callable[..., Decimal]) -> tuple[Decimal | None, bool]:
        exclusive = f"exclusive{key.capitalize()}"
        found = [(Decimal(str(schema[name])), name == exclusive) for name in (key, exclusive) if name in schema]
        if not found:
            return None, False
        value = choose(each for each, _ in found)
        return value, any(out for each, out in found if each == value)

    low, low_out = bound("minimum", max)
    high, high_out = bound("maximum", min)
    size = INT_FORMATS.get(schema.get("format", ""))
    if size is not None:
        low, low_out = (Decimal(-size), False) if low is None or low < -size else (low, low_out)
        high, high_out = (Decimal(size - 1), False) if high is None or high > size - 1 else (high, high_out)
        kind = "integer"
    step = schema.get("multipleOf", 1)
    try:
        if kind == "number" and "multipleOf" not in schema:
            return number(low, high, low_out=low_out, high_out=high_out)
        if step != int(step) or step <= 0:
            raise SchemaError("multipleOf is enforced for whole numbers only", at(place, "multipleOf"))
        if low is not None and low_out and low == low.to_integral_value():
            low += 1
        if high is not None and high_out and high == high.to_integral_value():
            high -= 1
        return integer(low, high, step=int(step))
    except SchemaError:
        raise
    except ConfigError as error:
        keys = ("multipleOf", "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
        raise SchemaError(str(error), at(place, next(key for key in keys if key in schema))) from error
