"""What OpenVINO means to say: its messages begin with the places in the source that they came through."""

from __future__ import annotations

__all__ = ["last_line"]


def last_line(error: BaseException) -> str:
    """The line of an engine's exception that tells the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if not line.startswith("Exception from")), type(error).__name__)
