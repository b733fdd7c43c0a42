"""Prompts of an exact number of tokens, each of which begins as no other does.

The engine keeps what it computed for a prompt and reuses it for the next one that begins the same, in
blocks of 16 tokens or more. A benchmark that repeats its prompt measures that cache. So every prompt
here differs from all others within its first few tokens.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

from ..system.json_text import parse

__all__ = ["KINDS", "Prompts"]

KINDS = ("text", "random")
TASK = "\nCopy the list above, line by line, exactly as it is written.\n"
THINGS = ("nails", "screws", "lamps", "chairs", "books", "cables", "pumps", "valves", "bricks", "bottles", "coats")
PLACES = ("harbour", "station", "market", "library", "workshop", "school", "garden", "mill", "tower", "bakery")
VERBS = ("sent to", "kept for", "bought from", "borrowed by", "promised to", "taken from", "repaired for")


class Prompts:
    """A source of fresh prompts for one model.

    Args:
        model_dir: The model directory, for its tokenizer.
        kind: `text` (an invented stock list and the request to copy it, so that drafting from the prompt has
            something to find) or `random` (tokens drawn evenly from the vocabulary).
        seed: Same seed, same sequence of prompts.
    """

    def __init__(self, model_dir: Path, kind: str = "text", seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._kind = kind
        self._seen: set[int] = set()
        self._model_dir = model_dir

    def make(self, tokens: int) -> list[int]:
        """Token ids of a new prompt.

        Args:
            tokens: How many; at least 1.
        """
        return self._draw(tokens) if self._kind == "random" else self._write(tokens)

    def _draw(self, tokens: int) -> list[int]:
        ordinary = self._ordinary()
        fresh = [token for token in ordinary if token not in self._seen]
        first = self._random.choice(fresh or ordinary)
        self._seen.add(first)
        return [first, *self._random.choices(ordinary, k=tokens - 1)]

    def _ordinary(self) -> range:
        """Tokens that are text: those after the last control token of a vocabulary's beginning."""
        config = parse((self._model_dir / "config.json").read_text(encoding="utf-8"))
        path = self._model_dir / "tokenizer.json"
        added = parse(path.read_text(encoding="utf-8")).get("added_tokens", []) if path.exists() else []
        control = {int(each["id"]) for each in added if each.get("special")}
        half = config["vocab_size"] // 2
        low = max((each for each in control if each < half), default=-1) + 1
        high = min((each for each in control if each >= half), default=config["vocab_size"])
        return range(low, high)

    def _write(self, tokens: int) -> list[int]:
        task = self._encode(TASK)
        # A number of nine digits, drawn anew, within the first tokens: no two prompts share a block.
        ids = self._encode(f"{self._random.randrange(10**8, 10**9)} is the number of this list.\n")
        while len(ids) < tokens:
            ids += self._encode("".join(self._line() for _ in range(16)))
        room = tokens - len(task)
        return ids[:room] + task if room > len(task) else ids[:tokens]

    def _line(self) -> str:
        pick = self._random.choice
        return f"{self._random.randrange(2, 999)} {pick(THINGS)} {pick(VERBS)} the {pick(PLACES)}.\n"

    @functools.cached_property
    def _tokenizer(self) -> Any:
        import openvino_genai

        return openvino_genai.Tokenizer(self._model_dir)

    def _encode(self, text: str) -> list[int]:
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        return [int(each) for each in encoded.input_ids.data[0]]
