"""Whether a text belongs to a grammar in XGrammar's EBNF, read apart from `serve`, which writes it."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

__all__ = ["accepts"]

TOKEN = re.compile(
    r'\s*(?:("(?:[^"\\]|\\.)*")|(\[(?:[^\]\\]|\\.)*\])|([A-Za-z_][\w.-]*)|(\{\d+(?:,\d*)?\})|([()|*+?]))'
)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "-": "-", "]": "]", "^": "^"}


def _plain(text: str) -> list[str]:
    """Characters, each escape as one."""
    found = re.findall(r"\\u([0-9a-f]{4})|\\U([0-9a-f]{8})|\\(.)|(.)", text, re.S)
    return [
        chr(int(short or long, 16)) if short or long else ESCAPES[mark] if mark else char
        for short, long, mark, char in found
    ]


def _ranges(text: str) -> list[tuple[str, str]]:
    marked = re.findall(r"\\u[0-9a-f]{4}|\\U[0-9a-f]{8}|\\.|.", text, re.S)
    ranges, index = [], 0
    while index < len(marked):
        low = _plain(marked[index])[0]
        if marked[index + 1 : index + 2] == ["-"] and index + 2 < len(marked):
            ranges.append((low, _plain(marked[index + 2])[0]))
            index += 3
        else:
            ranges.append((low, low))
            index += 1
    return ranges


class _Reader:
    def __init__(self, text: str) -> None:
        self._tokens = [match for match in TOKEN.finditer(text) if match[0].strip()]
        assert "".join("".join(match[0].split()) for match in self._tokens) == "".join(text.split()) or '"' in text
        self._at = 0

    def alternatives(self) -> Any:
        items = [self._row()]
        while self._take("|"):
            items.append(self._row())
        return ("alt", items)

    def _take(self, mark: str) -> bool:
        if self._at < len(self._tokens) and self._tokens[self._at][5] == mark:
            self._at += 1
            return True
        return False

    def _row(self) -> Any:
        items = []
        while self._at < len(self._tokens) and self._tokens[self._at][5] not in ("|", ")"):
            items.append(self._repeated(self._atom()))
        return ("seq", items)

    def _atom(self) -> Any:
        text, chars, name, _, mark = self._tokens[self._at].groups()
        self._at += 1
        if text is not None:
            return ("text", "".join(_plain(text[1:-1])))
        if chars is not None:
            return ("chars", _ranges(chars[1:-1]))
        if name is not None:
            return ("rule", name)
        assert mark == "("
        inner = self.alternatives()
        assert self._take(")")
        return inner

    def _repeated(self, item: Any) -> Any:
        for mark, bounds in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self._take(mark):
                return ("repeat", item, *bounds)
        if self._at < len(self._tokens) and (counts := self._tokens[self._at][4]):
            self._at += 1
            first, comma, last = counts[1:-1].partition(",")
            return ("repeat", item, int(first), (int(last) if last else None) if comma else int(first))
        return item


@functools.lru_cache(maxsize=32)
def _rules(grammar: str) -> dict[str, Any]:
    lines = (line.partition(" ::= ") for line in grammar.splitlines())
    return {name: _Reader(body).alternatives() for name, _, body in lines}


def accepts(grammar: str, text: str) -> bool:  # noqa: C901 - one branch for each kind of node
    """Whether the grammar's `root` gives the text."""
    rules = _rules(grammar)
    known: dict[tuple[str, int], frozenset[int]] = {}

    def ends(node: Any, begin: int) -> frozenset[int]:
        kind = node[0]
        if kind == "text":
            return frozenset([begin + len(node[1])] if text.startswith(node[1], begin) else [])
        if kind == "chars":
            fits = begin < len(text) and any(low <= text[begin] <= high for low, high in node[1])
            return frozenset([begin + 1] if fits else [])
        if kind == "rule":
            key = (node[1], begin)
            if key not in known:
                known[key] = frozenset()
                known[key] = ends(rules[node[1]], begin)
            return known[key]
        if kind == "alt":
            return frozenset().union(*(ends(each, begin) for each in node[1]))
        if kind == "seq":
            places = frozenset([begin])
            for each in node[1]:
                places = frozenset().union(*(ends(each, place) for place in places))
            return places
        return repeated(*node[1:], begin)

    def repeated(item: Any, least: int, most: int | None, begin: int) -> frozenset[int]:
        places, reached = frozenset([begin]), frozenset([begin] if least == 0 else [])
        for count in range(1, (most or len(text) + least) + 1):
            places = frozenset().union(*(ends(item, place) for place in places))
            if not places:
                break
            reached |= places if count >= least else frozenset()
        return reached

    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        return len(text) in ends(("rule", "root"), 0)
    finally:
        sys.setrecursionlimit(limit)
