"""Responses that are kept, so that a client can go on from one, or ask for it again.

They are kept in memory, oldest out first, and gone with the process. What is kept is JSON, so that the bound is what
they really take.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["MAX_BYTES", "MAX_RESPONSES", "ResponseStore", "Stored"]

MAX_RESPONSES = 1000
MAX_BYTES = 64 * 2**20


class Stored(NamedTuple):
    """A response and the conversation before it.

    Attributes:
        response: As the client got it.
        items: The items that it answers, those of earlier responses included.
    """

    response: dict[str, Any]
    items: list[dict[str, Any]]

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All items up to the end of the response."""
        return [*self.items, *self.response["output"]]


class ResponseStore:
    """A bounded memory of responses.

    Args:
        max_responses: Most responses.
        max_bytes: Longest text of all together; one that is longer alone is not kept.
    """

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._home: dict[str, str] = {}
        self.bytes = 0

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def keep(self, response: dict[str, Any], items: Sequence[dict[str, Any]]) -> None:
        """Keep a response, and forget the oldest where there is no place."""
        data = json.dumps([response, items]).encode()
        if len(data) > self._max_bytes:
            return
        self._kept[response["id"]] = data
        self.bytes += len(data)
        for item in (*items, *response["output"]):
            self._home[item["id"]] = response["id"]
        while len(self._kept) > self._max_responses or self.bytes > self._max_bytes:
            self.forget(next(iter(self._kept)))

    def get(self, response_id: str) -> Stored | None:
        """A response, if it is still there."""
        data = self._kept.get(response_id)
        return None if data is None else Stored(*json.loads(data))

    def item(self, item_id: str) -> dict[str, Any] | None:
        """An item of a conversation, if it is still there."""
        stored = self.get(self._home.get(item_id, ""))
        return next((each for each in stored.conversation if each["id"] == item_id), None) if stored else None

    def forget(self, response_id: str) -> bool:
        """Forget a response; whether it was there."""
        data = self._kept.pop(response_id, None)
        if data is None:
            return False
        self.bytes -= len(data)
        for item in Stored(*json.loads(data)).conversation:
            # A later response of the same conversation holds it too.
            if self._home.get(item["id"]) == response_id:
                del self._home[item["id"]]
        return True
