"""What /openapi.json says of the answers that many routes have in common."""

from __future__ import annotations

from typing import Any

from ..protocol import ErrorEnvelope

__all__ = ["ERRORS", "STREAMS"]

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope} for status in (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 504)
}

STREAMS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream"},
}
