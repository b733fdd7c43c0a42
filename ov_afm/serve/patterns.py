"""Regular expressions as grammars: the part of ECMA 262 that describes a regular language without looking around.

A JSON schema's `pattern` is searched for in the string unless `^` and `$` bind it; the text that a client asks for by
a regular expression alone must match as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .ebnf import ANY, NOTHING, Alt, Chars, Node, Rules, Seq, literal

__all__ = ["FORMATS", "Pattern", "PatternError"]

MAX_REPEAT = 2048
DIGIT = Chars.of([(48, 57)])
WORD = Chars.of([(48, 57), (65, 90), (95, 95), (97, 122)])
SPACE = Chars.of([(9, 13), (32, 32), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029)]) | Chars.of(
    [(0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF)]
)
DOT = Chars.of([(10, 10), (13, 13), (0x2028, 0x2029)]).others
CLASSES = {"d": DIGIT, "D": DIGIT.others, "w": WORD, "W": WORD.others, "s": SPACE, "S": SPACE.others}
CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
HEX_DIGITS = {"x": 2, "u": 4}

_YEAR = r"[0-9]{4}"
_LEAP = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    rf"|{_LEAP}-02-29)"
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_COUNT = r"[0-9]{1,4}"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,20}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,4}}"
_PATH = r"[A-Za-z0-9._~!$&'()*+,;=:@/-]"
_BYTE = r"(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
# The strings that are generated for a `format`; `uri` gives web addresses only.
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": rf"P({_COUNT}D(T{_COUNT}H)?|T({_COUNT}H({_COUNT}M({_COUNT}S)?)?|{_COUNT}M({_COUNT}S)?|{_COUNT}S))",
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "hostname": _HOST,
    "email": rf"[A-Za-z0-9_+-]{{1,20}}(\.[A-Za-z0-9_+-]{{1,20}}){{0,2}}@({_LABEL}\.){{1,3}}[A-Za-z]{{2,12}}",
    "uri": rf"https?://{_HOST}(:[1-9][0-9]{{0,3}})?(/{_PATH}*)?",
}


class PatternError(ConfigError):
    """A regular expression that is none, or that no grammar can follow."""


@dataclass(frozen=True, slots=True)
class _Set:
    chars: Chars


@dataclass(frozen=True, slots=True)
class _Repeat:
    item: _Part
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class _Row:
    items: Sequence[_Part]


@dataclass(frozen=True, slots=True)
class _Choice:
    items: Sequence[_Part]


_Part = _Set | _Repeat | _Row | _Choice
_ANYTHING = _Repeat(_Set(ANY), 0, None)


class Pattern:
    """A regular expression.

    Args:
        text: The expression.
        whole: It must match the whole text, with or without anchors.

    Raises:
        PatternError: It is no regular expression, or uses what no grammar can follow.
    """

    def __init__(self, text: str, *, whole: bool = False) -> None:
        self._text, self._at, self._depth = text, 0, 0
        branches = []
        while True:
            begin = self._take("^")
            row = self._row()
            end = self._take("$")
            free = [] if begin or whole else [_ANYTHING]
            branches.append(_Row([*free, *row.items, *([] if end or whole else [_ANYTHING])]))
            if not self._take("|"):
                break
        if self._at < len(text):
            raise PatternError(f"{text[self._at]!r} at {self._at} has no beginning")
        self._root: _Part = branches[0] if len(branches) == 1 else _Choice(branches)

    def bounded(self, least: int, most: int | None) -> None:
        """Let only texts of these lengths match.

        Raises:
            PatternError: The expression allows others, in more than one place.
        """
        shortest, longest = _lengths(self._root)
        if shortest >= least and (most is None or (longest is not None and longest <= most)):
            return
        rows = list(self._root.items) if isinstance(self._root, _Row) else [self._root]
        rows = [item for row in rows for item in (row.items if isinstance(row, _Row) else [row])]
        varying = [index for index, item in enumerate(rows) if len(set(_lengths(item))) > 1]
        item = rows[varying[0]] if len(varying) == 1 else None
        if not isinstance(item, _Repeat) or not isinstance(item.item, _Set):
            raise PatternError("a length beside this pattern cannot be enforced; write the length into the pattern")
        fixed = shortest - item.least
        low = max(item.least, least - fixed)
        ends = [each for each in (item.most, None if most is None else most - fixed) if each is not None]
        high = min(ends) if ends else None
        if high is not None and high < low:
            raise PatternError("no text has both this pattern and this length")
        rows[varying[0]] = _Repeat(item.item, low, high)
        self._root = _Row(rows)

    def node(self, rules: Rules, end: str) -> Node:
        """The grammar of what matches, and the text that ends it."""
        root = self._root
        if isinstance(root, _Row) and len(root.items) == 1:
            root = root.items[0]
        if isinstance(root, _Repeat) and isinstance(root.item, _Set) and (root.most or 0) <= MAX_REPEAT:
            return rules.text(root.item.chars, root.least, root.most, end)
        return Seq((_node(root, rules), literal(end))) if end else _node(root, rules)

    # -- Reading

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        if not self._text.startswith(text, self._at):
            return False
        self._at += len(text)
        return True

    def _row(self) -> _Row:
        items: list[_Part] = []
        while (char := self._peek()) and char not in "|)":
            if char == "$" and self._text[self._at + 1 : self._at + 2] in ("", "|") and not self._depth:
                break
            if char in "^$":
                raise PatternError(f"{char!r} at {self._at} is not at an end of the pattern")
            items.append(self._repeated(self._atom()))
        return _Row(items)

    def _repeated(self, item: _Part) -> _Part:
        least: int
        most: int | None
        if self._take("*"):
            least, most = 0, None
        elif self._take("+"):
            least, most = 1, None
        elif self._take("?"):
            least, most = 0, 1
        elif self._peek() == "{":
            least, most = self._counts()
        else:
            return item
        if not self._take("?") and self._peek() and self._peek() in "*+":
            raise PatternError(f"{self._peek()!r} at {self._at} has nothing to repeat")
        if max(least, most or 0) > MAX_REPEAT:
            raise PatternError(f"it repeats {max(least, most or 0)} times; at most {MAX_REPEAT} are allowed")
        inner = item
        while isinstance(inner, _Row) and len(inner.items) == 1:
            inner = inner.items[0]
        if isinstance(inner, _Repeat) and inner.least != inner.most and most != 1:
            raise PatternError("it repeats a repetition, so that there are too many ways to match; write one of them")
        return _Repeat(item, least, most)

    def _counts(self) -> tuple[int, int | None]:
        close = self._text.find("}", self._at)
        first, comma, last = self._text[self._at + 1 : close].partition(",")
        numbers = [first] + ([last] if last else [])
        if close < 0 or not all(each.isascii() and each.isdigit() and len(each) < 9 for each in numbers):
            raise PatternError(f"'{{' at {self._at} begins no count")
        self._at = close + 1
        least = int(first)
        most = least if not comma else int(last) if last else None
        if most is not None and most < least:
            raise PatternError(f"{{{least},{most}}} has its bounds the wrong way round")
        return least, most

    def _atom(self) -> _Part:
        char = self._text[self._at]
        if char in "*+?":
            raise PatternError(f"{char!r} at {self._at} has nothing to repeat")
        self._at += 1
        if char == "(":
            return self._group()
        if char == "[":
            return _Set(self._class())
        if char == ".":
            return _Set(DOT)
        if char == "\\":
            return _Set(self._escape(within=False))
        if char in "{}]":
            raise PatternError(f"{char!r} at {self._at - 1} needs a backslash before it")
        return _Set(Chars.of([(ord(char), ord(char))]))

    def _group(self) -> _Part:
        if self._take("?") and not self._take(":"):
            if not (self._peek() == "<" and self._text[self._at + 1 : self._at + 2] not in ("=", "!")):
                raise PatternError("it looks around or sets flags, which no grammar can follow")
            self._at = self._text.find(">", self._at) + 1 or len(self._text)
        self._depth += 1
        if self._depth > 50:
            raise PatternError("it is nested too deeply")
        branches = [self._row()]
        while self._take("|"):
            branches.append(self._row())
        if not self._take(")"):
            raise PatternError("a '(' is not closed")
        self._depth -= 1
        return branches[0] if len(branches) == 1 else _Choice(branches)

    def _class(self) -> Chars:
        negative = self._take("^")
        chars = Chars(())
        while not self._take("]"):
            low = self._member()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._member()
                if isinstance(low, Chars) or isinstance(high, Chars) or high < low:
                    raise PatternError(f"a range that ends at {self._at} is none")
                chars |= Chars.of([(low, high)])
            else:
                chars |= low if isinstance(low, Chars) else Chars.of([(low, low)])
        return chars.others if negative else chars

    def _member(self) -> int | Chars:
        if not self._peek():
            raise PatternError("a '[' is not closed")
        char = self._text[self._at]
        self._at += 1
        if char != "\\":
            return ord(char)
        chars = self._escape(within=True)
        (first, *more) = chars.ranges or ((0, 1),)
        return first[0] if not more and first[0] == first[1] else chars

    def _escape(self, *, within: bool) -> Chars:
        char = self._peek()
        self._at += 1
        if char in CLASSES:
            return CLASSES[char]
        point: int | None = CONTROLS.get(char)
        if char in HEX_DIGITS:
            digits = self._text[self._at : self._at + HEX_DIGITS[char]]
            if len(digits) != HEX_DIGITS[char] or not all(each in "0123456789abcdefABCDEF" for each in digits):
                raise PatternError(f"'\\{char}' at {self._at - 2} needs {HEX_DIGITS[char]} hexadecimal digits")
            self._at += len(digits)
            point = int(digits, 16)
        elif char == "b" and within:
            point = 8
        elif char and not char.isalnum():
            point = ord(char)
        if point is None:
            raise PatternError(f"'\\{char}' at {self._at - 2} is not supported")
        return Chars.of([(point, point)])


def _lengths(part: _Part) -> tuple[int, int | None]:
    """Characters of the shortest and of the longest text."""
    if isinstance(part, _Set):
        return 1, 1
    if isinstance(part, _Repeat):
        shortest, longest = _lengths(part.item)
        return shortest * part.least, None if longest is None or part.most is None else longest * part.most
    each = [_lengths(item) for item in part.items]
    join: Callable[[list[int]], int] = sum if isinstance(part, _Row) else max
    ends = [end for _, end in each]
    longest = None if None in ends else join([end for end in ends if end is not None])
    return (sum if isinstance(part, _Row) else min)(low for low, _ in each), longest


def _node(part: _Part, rules: Rules) -> Node:
    if isinstance(part, _Set):
        return rules.char(part.chars)
    if isinstance(part, _Row):
        return Seq([_node(item, rules) for item in part.items])
    if isinstance(part, _Choice):
        return Alt([_node(item, rules) for item in part.items])
    if part.most == 0:
        return Seq(())
    one = _node(part.item, rules)
    if one == NOTHING:
        return Seq(()) if part.least == 0 else NOTHING
    head = [one] * part.least
    if part.most is None:
        rest = rules.reserve("m")
        rules.fill(rest, Alt((Seq(()), Seq((one, rest)))))
        return Seq((*head, rest))
    more: Node = Seq(())
    for _ in range(part.most - part.least):
        more = rules.define(Alt((Seq(()), Seq((one, more)))), "u")
    return Seq((*head, more)) if head else more
