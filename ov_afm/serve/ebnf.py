"""Grammars as small trees, and their text in XGrammar's EBNF.

What follows from how XGrammar 0.1.31 (the one in GenAI 2026.4) works: it computes a mask over the vocabulary for each
place of a rule that reads a character, so equal rules are made once. It repeats more than 128 times in a way that
takes half a second a token, so long repetitions become rules here (`Rules.text`). A rule that ends within a token
leaves the token to be checked while text is generated, so the quotation mark that ends a string is part of the rule
that counts its characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["NOTHING", "Alt", "Chars", "Node", "Raw", "Ref", "Rules", "Seq", "literal"]

# Characters of one block of a counted string.
BLOCK = 32
SURROGATES = (0xD800, 0xDFFF)
LAST = 0x10FFFF


@dataclass(frozen=True, slots=True)
class Raw:
    """EBNF that names no rule."""

    text: str


@dataclass(frozen=True, slots=True)
class Ref:
    """A rule."""

    name: str


@dataclass(frozen=True, slots=True)
class Seq:
    """One after the other."""

    items: Sequence[Node]

    def __post_init__(self) -> None:
        """Make it hashable: equal rules are found by their bodies."""
        object.__setattr__(self, "items", tuple(self.items))


@dataclass(frozen=True, slots=True)
class Alt:
    """One of them; of none there is no text."""

    items: Sequence[Node]

    def __post_init__(self) -> None:
        """Make it hashable: equal rules are found by their bodies."""
        object.__setattr__(self, "items", tuple(self.items))


Node = Raw | Ref | Seq | Alt
EMPTY = Raw('""')
NOTHING = Alt(())


@dataclass(frozen=True, slots=True)
class Chars:
    """A set of characters, as sorted ranges of code points that do not touch."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Chars:
        """The union of ranges, without surrogates, which no text has."""
        joined: list[tuple[int, int]] = []
        for low, high in sorted(ranges):
            if joined and low <= joined[-1][1] + 1:
                joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
            elif low <= high:
                joined.append((low, high))
        parts: list[tuple[int, int]] = []
        for low, high in joined:
            parts += [(low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high)]
        return cls(tuple((low, high) for low, high in dict.fromkeys(parts) if low <= high))

    def without(self, other: Chars) -> Chars:
        """What the other set lacks."""
        return self & other.others

    @property
    def others(self) -> Chars:
        """All other characters."""
        ends = [-1, *(end for pair in self.ranges for end in pair), LAST + 1]
        return Chars.of((low + 1, high - 1) for low, high in zip(ends[::2], ends[1::2], strict=True))

    def __and__(self, other: Chars) -> Chars:
        """What both have."""
        pairs = ((max(a, c), min(b, d)) for a, b in self.ranges for c, d in other.ranges)
        return Chars.of((low, high) for low, high in pairs if low <= high)

    def __or__(self, other: Chars) -> Chars:
        """What one of them has."""
        return Chars.of((*self.ranges, *other.ranges))

    def __bool__(self) -> bool:
        """Whether there is any character."""
        return bool(self.ranges)

    @property
    def ebnf(self) -> str:
        """The set as a character class."""
        parts = (part for low, high in self.ranges for part in _encoded(low, high))
        return "[" + "".join(_code(low) if low == high else f"{_code(low)}-{_code(high)}" for low, high in parts) + "]"


def _encoded(low: int, high: int) -> Iterator[tuple[int, int]]:
    """A range in parts whose UTF-8 is a range for each byte.

    XGrammar 0.1.31 reads others wrongly: in a class from U+C000 to U+D7FF there is no way to go on after the first byte
    of U+D000, and the engine's process dies. The parts are found as in RE2 and the crate utf8-ranges.
    """
    for last in (0x7F, 0x7FF, 0xFFFF):
        if low <= last < high:
            yield from _encoded(low, last)
            yield from _encoded(last + 1, high)
            return
    for bits in (6, 12, 18) if low > 0x7F else ():
        mask = (1 << bits) - 1
        if low & ~mask != high & ~mask:
            if low & mask:
                yield from _encoded(low, low | mask)
                yield from _encoded((low | mask) + 1, high)
                return
            if high & mask != mask:
                yield from _encoded(low, (high & ~mask) - 1)
                yield from _encoded(high & ~mask, high)
                return
    yield low, high


def _code(point: int) -> str:
    char = chr(point)
    if char.isascii() and char.isalnum():
        return char
    return f"\\u{point:04x}" if point <= 0xFFFF else f"\\U{point:08x}"


def literal(text: str) -> Raw:
    """Exactly this text."""
    plain = "".join(c if c.isalnum() or c in " {}[]:,._-/<>'" else _code(ord(c)) for c in text)
    return Raw(f'"{plain}"')


ANY = Chars.of([(0, LAST)])
CONTROL = Chars.of([(0, 0x1F)])
# What stands for itself in a JSON string.
PLAIN = ANY.without(CONTROL | Chars.of([(ord('"'), ord('"')), (ord("\\"), ord("\\"))]))
SHORT = {'"': '"', "\\": "\\", "\n": "n", "\t": "t", "\r": "r", "\b": "b", "\f": "f"}


class Rules:
    """The rules of a grammar under construction; equal ones are one.

    Args:
        quoted: Characters are those of a JSON string, with its escapes; otherwise of plain text.
    """

    def __init__(self, *, quoted: bool = True) -> None:
        self._quoted = quoted
        self._bodies: dict[str, Node] = {}
        self._names: dict[Node, str] = {}
        # Rules that have no text.
        self._dead: set[str] = set()

    def __len__(self) -> int:
        """How many rules there are."""
        return len(self._bodies)

    def define(self, body: Node, hint: str = "r") -> Ref:
        """A rule with this body."""
        if isinstance(body, Ref):
            return body
        name = self._names.get(body)
        if name is None:
            name = self._names[body] = self._new_name(hint)
            self._bodies[name] = body
        return Ref(name)

    def reserve(self, hint: str = "r") -> Ref:
        """A rule whose body comes later, by `fill`."""
        name = self._new_name(hint)
        self._bodies[name] = NOTHING
        return Ref(name)

    def fill(self, rule: Ref, body: Node) -> None:
        """Give a reserved rule its body."""
        self._bodies[rule.name] = body

    def _new_name(self, hint: str) -> str:
        return f"{hint}_{len(self._bodies)}"

    # -- Characters and texts

    def char(self, chars: Chars) -> Node:
        """One character of a set; in a JSON string one that needs it is escaped."""
        if not self._quoted:
            return Raw(chars.ebnf) if chars else NOTHING
        items: list[Node] = []
        if plain := chars & PLAIN:
            items.append(Raw(plain.ebnf))
        if chars == ANY:
            items.append(Seq((Raw(r'"\\"'), self.define(Alt((Raw(r'["\\/bfnrt]'), *_UNICODE)), "escape"))))
            return Alt(items)
        special = chars.without(PLAIN)
        points = [point for low, high in special.ranges for point in range(low, high + 1)]
        for point in points:
            short = SHORT.get(chr(point))
            items.append(literal("\\" + (short or f"u{point:04x}")))
        return Alt(items) if items else NOTHING

    def text(self, chars: Chars, least: int, most: int | None, end: str) -> Node:
        """From `least` to `most` characters of a set, and the text that ends them."""
        one = self.char(chars)
        if one == NOTHING:
            return literal(end) if least == 0 else NOTHING
        items: list[Node] = []
        if most is None:
            while least > BLOCK:
                items.append(self._exactly(one, BLOCK))
                least -= BLOCK
            return Seq((*items, self._at_least(one, least, end)))
        rest = most - least
        for size in [BLOCK] * (least // BLOCK) + ([least % BLOCK] if least % BLOCK else []):
            items.append(self._exactly(one, size))
        return Seq((*items, self._at_most(one, rest, end)))

    def _exactly(self, one: Node, count: int) -> Node:
        rule: Node = self.define(one, "b")
        for _ in range(count - 1):
            rule = self.define(_then(one, rule), "b")
        return rule

    def _at_least(self, one: Node, count: int, end: str) -> Ref:
        key = Seq((Raw("more"), one, Raw(end)))
        if key not in self._names:
            rule = self.reserve("s")
            self._names[key] = rule.name
            self.fill(rule, Alt((literal(end), _then(one, rule))))
        rule = Ref(self._names[key])
        for _ in range(count):
            rule = self.define(_then(one, rule), "s")
        return rule

    def _at_most(self, one: Node, count: int, end: str) -> Node:
        if count >= BLOCK:
            rest = self._at_most(one, count % BLOCK, end)
            for _ in range(count // BLOCK):
                short = self._at_most(one, BLOCK - 1, end)
                rest = self.define(Alt((short, Seq((self._exactly(one, BLOCK), rest)))), "t")
            return rest
        rule: Node = self.define(literal(end), "e")
        for _ in range(count):
            rule = self.define(Alt((literal(end), _then(one, rule))), "p")
        return rule

    # -- The whole

    def productive(self, root: Node) -> bool:
        """Whether the grammar has any text at all."""
        done: set[str] = set()

        def ends(node: Node) -> bool:
            if isinstance(node, Ref):
                return node.name in done
            if isinstance(node, Seq):
                return all(ends(each) for each in node.items)
            return any(ends(each) for each in node.items) if isinstance(node, Alt) else True

        before = -1
        while len(done) != before:
            before = len(done)
            done |= {name for name, body in self._bodies.items() if name not in done and ends(body)}
        self._dead = self._bodies.keys() - done
        return ends(root)

    def render(self, root: Node) -> str:
        """The grammar as text; rules that have no text are left out. Call `productive` first."""
        wanted, order = [root], []
        known: set[str] = set()
        while wanted:
            node = wanted.pop()
            if isinstance(node, Ref):
                if node.name not in known and node.name not in self._dead:
                    known.add(node.name)
                    order.append(node.name)
                    wanted.append(self._bodies[node.name])
            elif not isinstance(node, Raw):
                wanted.extend(node.items)
        lines = [f"root ::= {self._show(root)}"]
        lines += [f"{name} ::= {self._show(self._bodies[name])}" for name in order]
        return "\n".join(lines) + "\n"

    def _show(self, node: Node, *, inner: bool = False) -> str:
        if isinstance(node, Raw):
            return node.text
        if isinstance(node, Ref):
            return node.name
        if isinstance(node, Seq):
            return " ".join(self._show(each, inner=True) for each in node.items) or '""'
        items = [each for each in node.items if not self._is_dead(each)]
        text = " | ".join(self._show(each) for each in items)
        return f"({text})" if inner and len(items) > 1 else text

    def _is_dead(self, node: Node) -> bool:
        if isinstance(node, Ref):
            return node.name in self._dead
        if isinstance(node, Seq):
            return any(self._is_dead(each) for each in node.items)
        return all(self._is_dead(each) for each in node.items) if isinstance(node, Alt) else False


def _then(one: Node, rest: Node) -> Node:
    """A character and what follows, with the alternatives of the character outside: XGrammar reads them faster."""
    if isinstance(one, Alt):
        return Alt(tuple(Seq((each, rest)) for each in one.items))
    return Seq((one, rest))


# Escapes by number: any character but half of a pair, and pairs.
_HEX = "[0-9a-fA-F]"
_UNICODE = (
    Raw(f'"u" [0-9a-cA-CefEF] {_HEX} {_HEX} {_HEX}'),
    Raw(f'"u" [dD] [0-7] {_HEX} {_HEX}'),
    Raw(f'"u" [dD] [89abAB] {_HEX} {_HEX} "\\\\u" [dD] [c-fC-F] {_HEX} {_HEX}'),
)
