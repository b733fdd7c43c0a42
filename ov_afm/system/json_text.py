"""JSON from files and clients, whose every fault is a `ValueError`."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse"]


def parse(text: str | bytes, **options: Any) -> Any:
    """A JSON value; the arguments are those of `json.loads`.

    Raises:
        ValueError: The text is no JSON, no Unicode, or nested so deeply that Python cannot read it.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
