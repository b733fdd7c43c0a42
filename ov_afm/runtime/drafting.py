"""How many tokens to draft from the prompt: as many as would have paid so far.

Prompt lookup continues the last few tokens as they were continued where they first occurred. GenAI (2026.4) takes one
length of drafts for a request, at least 1, and fills shorter drafts up to it, so each step computes `1 + length` tokens
whether there was anything to draft or not. What every length would have brought is known from the tokens alone: the
lookup is replayed on the answer as it grows. Where another length would take clearly less time, the request is ended
and continued with that length; the engine finds what it has computed in its prefix cache.

    drafting = Drafting(prompt_ids, max_new_tokens=256)
    ...
    if drafting.push(token): continue the request with `drafting.length`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["COSTS", "LENGTHS", "NGRAM", "Drafting"]

# The last tokens that are looked up; GenAI tries fewer where so many are not found.
NGRAM = 3
LENGTHS = (1, 3, 5, 7)
# What a step with drafts costs, in steps of one token, where it was not measured: a Xeon with AMX, AFM-4.5B's layers.
COSTS = {length: 1 + 0.12 * length for length in LENGTHS}
# What continuing a request costs, in steps of one token: what lies after the last whole block of the cache is computed
# again.
SWITCH_COST = 4.0
# Tokens of the answer between looks, and the last ones that lengths are compared on.
LOOK, SEEN = 16, 32
# Tokens that are expected to go on like those; fewer where the answer may not have so many.
HORIZON = 32


class Drafting:
    """The length of the drafts of one request.

    Args:
        prompt: Token ids.
        max_new_tokens: Tokens that the answer may have.
        costs: Each length → what a step with such drafts costs, in steps of one token.

    Attributes:
        length: Tokens to draft.
        ids: Prompt and answer so far.
        left: Tokens that the answer may still have.
    """

    def __init__(self, prompt: Sequence[int], max_new_tokens: int, costs: Mapping[int, float] = COSTS) -> None:
        self.length, self.left, self._costs = LENGTHS[0], max_new_tokens, costs
        self.ids: list[int] = []
        self._first: dict[tuple[int, ...], int] = {}
        for token in prompt:
            self._add(token)
        self._prompt_tokens = len(self.ids)

    def push(self, token: int) -> bool:
        """Add a token of the answer; returns whether the request should now be continued with another `length`."""
        self._add(token)
        self.left -= 1
        generated = len(self.ids) - self._prompt_tokens
        if generated % LOOK or self.left < LOOK:
            return False
        seen = min(generated, SEEN)
        costs = {length: self._steps(length, seen) * self._costs[length] / seen for length in LENGTHS}
        best = min(costs, key=lambda length: costs[length])
        if (costs[self.length] - costs[best]) * min(HORIZON, self.left) <= SWITCH_COST:
            return False
        self.length = best
        return True

    def _add(self, token: int) -> None:
        self.ids.append(token)
        for size in range(1, NGRAM + 1):
            if size <= len(self.ids):
                self._first.setdefault(tuple(self.ids[-size:]), len(self.ids) - size)

    def _steps(self, length: int, tokens: int) -> int:
        """Steps that the last tokens take with drafts of a length."""
        at, steps = len(self.ids) - tokens, 0
        while at < len(self.ids):
            at += 1 + self._accepted(at, length)
            steps += 1
        return steps

    def _accepted(self, at: int, length: int) -> int:
        """How many tokens of a draft after the first `at` tokens are those that followed."""
        ids = self.ids
        for size in range(min(NGRAM, at // 2), 0, -1):
            first = self._first[tuple(ids[at - size : at])]
            if first < at - size:
                draft, actual = ids[first + size : min(first + size + length, at)], ids[at : at + length]
                same = [one == other for one, other in zip(draft, actual, strict=False)]
                return same.index(False) if False in same else len(same)
        return 0
