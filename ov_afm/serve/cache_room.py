"""What the KV cache holds, counted from outside openvino-genai, which does not tell.

Two questions are answered here: is there room for another prompt, and how much of a prompt is cached already. The
first answer must not be too hopeful. The second may be wrong: then the prompt takes longer, and nothing else happens.

A block is named by a chain of hashes: its tokens, and the name of the block before it.
"""

from __future__ import annotations

import collections
from collections.abc import Hashable, Sequence

__all__ = ["CacheRoom"]


class CacheRoom:
    """The blocks of the KV cache.

    Args:
        blocks: How many there are.
        block_tokens: Tokens in each.
    """

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks, self.block_tokens = blocks, block_tokens
        self._held: dict[int, list[Hashable]] = {}
        self._uses: collections.Counter[Hashable] = collections.Counter()
        # In use by somebody, and computed: GenAI gives them to whoever comes with the same prefix.
        self._shared: set[Hashable] = set()
        # As GenAI does it: what was not used for the longest time is overwritten first.
        self._computed: collections.OrderedDict[int, None] = collections.OrderedDict()

    def names(self, tokens: Sequence[int], known: Sequence[int] = ()) -> list[int]:
        """Names of the blocks that tokens fill.

        Args:
            tokens: Token ids.
            known: Names of the first blocks.
        """
        names, size = list(known), self.block_tokens
        last = names[-1] if names else 0
        for begin in range(len(names) * size, len(tokens) - size + 1, size):
            last = hash((last, *tokens[begin : begin + size]))
            names.append(last)
        return names

    def count(self, tokens: int) -> int:
        """Blocks that so many tokens need."""
        return -(-tokens // self.block_tokens)

    @property
    def used(self) -> int:
        """Blocks that are taken."""
        return len(self._uses)

    def missing(self, names: Sequence[int]) -> int:
        """Blocks that a prompt would take: those that nobody shares with it."""
        for position, name in enumerate(names):
            if name not in self._shared:
                return len(names) - position
        return 0

    def take(self, owner: int, names: Sequence[int]) -> None:
        """Count a prompt's blocks as used."""
        shared = len(names) - self.missing(names)
        # Two prompts that are computed at the same time have the same blocks twice.
        held: list[Hashable] = [
            name if position < shared or name not in self._uses else (owner, position)
            for position, name in enumerate(names)
        ]
        self._held[owner] = held
        self._uses.update(held)

    def share(self, owner: int) -> None:
        """A prompt that has taken its blocks is computed."""
        self._shared.update(name for name in self._held[owner] if not isinstance(name, tuple))

    def give_back(self, owner: int) -> None:
        """Count an owner's blocks as free; it need not have any."""
        for name in self._held.pop(owner, ()):
            self._uses[name] -= 1
            if not self._uses[name]:
                del self._uses[name]
                self._shared.discard(name)

    def remember(self, names: Sequence[int]) -> None:
        """These blocks were computed, or used again, just now."""
        for name in names:
            self._computed[name] = None
            self._computed.move_to_end(name)
        while len(self._computed) > self.blocks:
            self._computed.popitem(last=False)

    def cached_tokens(self, names: Sequence[int]) -> int:
        """Tokens at the beginning of a prompt that the cache seems to hold."""
        for position, name in enumerate(names):
            if name not in self._computed:
                return position * self.block_tokens
        return len(names) * self.block_tokens
