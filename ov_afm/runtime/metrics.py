"""What one request cost.

`ttft_ms` is the time that a user waits for the first token, queueing behind other requests included;
`tpot_ms` is the mean gap between tokens after it, so that prompt length and decode speed stay apart.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RequestMetrics"]


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """What one request measured.

    Attributes:
        prompt_tokens: Tokens of the prompt, template included.
        new_tokens: Tokens generated, an end-of-text token included.
        ttft_ms: Request to first token; the whole time where no token came.
        tpot_ms: Mean time between tokens after the first; None below two tokens.
        total_ms: Request to end.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    total_ms: float

    @property
    def tokens_per_s(self) -> float | None:
        """Decode rate after the first token; None where it was not measured."""
        return 1000 / self.tpot_ms if self.tpot_ms else None

    @classmethod
    def from_times(
        cls, prompt_tokens: int, new_tokens: int, *, start: float, first: float | None, last: float | None, end: float
    ) -> RequestMetrics:
        """The record of a request from clock readings in seconds.

        Args:
            prompt_tokens: Tokens of the prompt.
            new_tokens: Tokens generated.
            start: When the request was made.
            first: When the first token came; None if none came.
            last: When the last token came.
            end: When the request was over.
        """
        tpot_ms = None
        if new_tokens > 1 and first is not None and last is not None:
            tpot_ms = (last - first) * 1000 / (new_tokens - 1)
        return cls(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            ttft_ms=((end if first is None else first) - start) * 1000,
            tpot_ms=tpot_ms,
            total_ms=(end - start) * 1000,
        )
