"""What /openapi.json says of the answers that many routes have in common."""

from __future__ import annotations

from typing import Any

from ..protocol import ErrorEnvelope

__all__ = ["ERRORS", "STATUSES", "STREAMS"]

# Of errors, in every API.
STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 502, 503, 504)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorEnvelope} for status in STATUSES}

STREAMS: dict[int | str, dict[str, Any]] = {
    **ERRORS,
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Whole, or as a stream"},
}
