"""Filter calibration text: drop duplicates, near duplicates and degenerate text, which add nothing."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator

__all__ = ["Cleaner"]

# Jaccard similarity of word shingles from which two texts are the same; the customary value for web text.
SIMILAR = 0.8
SHINGLE_WORDS = 5
PERMUTATIONS = 64
# Shorter texts share shingles by chance.
SHINGLED_WORDS = 20
# Text that compresses to less than this share repeats itself; prose stays above 0.4, code above 0.2.
REPEATS = 0.12
REPEATS_CHARACTERS = 256
PRINTABLE = 0.9


class Cleaner:
    """Drops texts that add nothing; remembers what it has seen over all sources.

    Attributes:
        counts: Texts read and dropped since `reset`, by reason.
    """

    def __init__(self) -> None:
        from datasketch import MinHashLSH

        self._seen: set[bytes] = set()
        self._similar = MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS)
        self.reset()

    def reset(self) -> None:
        """Count anew, for the next source."""
        self.counts = {"texts": 0, "duplicates": 0, "near_duplicates": 0, "degenerate": 0}

    def keep(self, texts: Iterator[str]) -> Iterator[str]:
        """Those of the texts that are worth running."""
        for text in texts:
            self.counts["texts"] += 1
            reason = self._reason_against(text)
            if reason is None:
                yield text
            else:
                self.counts[reason] += 1

    def _reason_against(self, text: str) -> str | None:
        if _degenerate(text):
            return "degenerate"
        words = text.split()
        digest = hashlib.sha256(" ".join(words).encode()).digest()
        if digest in self._seen:
            return "duplicates"
        self._seen.add(digest)
        if len(words) < SHINGLED_WORDS:
            return None
        sketch = _sketch(words)
        if self._similar.query(sketch):
            return "near_duplicates"
        self._similar.insert(digest, sketch)
        return None


def _sketch(words: list[str]) -> object:
    from datasketch import MinHash

    sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
    shingles = {" ".join(words[at : at + SHINGLE_WORDS]) for at in range(len(words) - SHINGLE_WORDS + 1)}
    sketch.update_batch([shingle.encode() for shingle in sorted(shingles)])
    return sketch


def _degenerate(text: str) -> bool:
    """Whether a text is blank, mostly not printable, or one thing over and over."""
    if not text.strip():
        return True
    if sum(character.isprintable() or character.isspace() for character in text) < PRINTABLE * len(text):
        return True
    raw = text.encode()
    return len(text) >= REPEATS_CHARACTERS and len(zlib.compress(raw)) < REPEATS * len(raw)
