"""Whether JSON is valid by a schema: the last check of an answer before the server says that it is complete.

The grammar of an answer is ours and XGrammar's; the validator is neither. jsonschema-rs reads patterns with an engine
whose time is linear, so that no pattern of a client holds up the server.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from ..system.json_text import parse

__all__ = ["mistake", "validator"]

LONGEST = 200


def validator(schema: Any) -> Any:
    """What checks values by a schema.

    Raises:
        ValueError: It is no schema.
    """
    import jsonschema_rs

    if isinstance(schema, dict):
        # Neither is needed, and both are addresses.
        schema = {key: value for key, value in schema.items() if key not in ("$schema", "$id")}
    return jsonschema_rs.Draft202012Validator(schema, pattern_options=jsonschema_rs.RegexOptions(), retriever=_nothing)


def _nothing(address: str) -> Any:
    raise ValueError(f"{address} is not part of the schema")


@functools.lru_cache(maxsize=64)
def _of_text(schema: str) -> Any:
    return validator(json.loads(schema))


def mistake(text: str, schema: str) -> str | None:
    """What is wrong with a text that a schema, itself JSON text, should allow; None if nothing is."""
    try:
        value = parse(text)
    except ValueError as error:
        return f"it is not JSON: {error}"[:LONGEST]
    first = next(iter(_of_text(schema).iter_errors(value)), None)
    if first is None:
        return None
    place = ".".join(str(each) for each in first.instance_path)
    return f"{place or 'it'}: {first.message}"[:LONGEST]
