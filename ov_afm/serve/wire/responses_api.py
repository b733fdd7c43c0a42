"""OpenAI's Responses API: its routes, and what a response needs of earlier ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel

from ..answers import Running, until_gone
from ..errors import APIError
from ..service import Service
from .openapi import ERRORS, STREAMS
from .responses_items import SYSTEM, checked_items, refers
from .responses_output import Response, events, whole
from .responses_request import ResponsesRequest, chat_request, in_our_words
from .responses_store import ResponseStore, Stored
from .responses_tools import ToolTable

__all__ = ["add_routes"]


class Deleted(BaseModel):
    """Answer of `DELETE /v1/responses/ID`."""

    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputTokens(BaseModel):
    """Answer of `POST /v1/responses/input_tokens`."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class ItemList(BaseModel):
    """Answer of `GET /v1/responses/ID/input_items`."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def add_routes(app: FastAPI, service: Service) -> None:
    """Add this API's routes to the application."""
    api = Responses(service, ResponseStore())
    one = "/v1/responses/{response_id}"
    add = app.add_api_route
    add("/v1/responses", api.create, methods=["POST"], response_model=Response, responses=STREAMS)
    add("/v1/responses/input_tokens", api.count, methods=["POST"], response_model=InputTokens, responses=ERRORS)
    add(one, api.get, methods=["GET"], response_model=Response, responses=ERRORS)
    add(one, api.delete, methods=["DELETE"], response_model=Deleted, responses=ERRORS)
    add(f"{one}/input_items", api.input_items, methods=["GET"], response_model=ItemList, responses=ERRORS)


class Responses:
    """What the routes do.

    Args:
        service: What answers.
        store: Where responses are kept.
    """

    def __init__(self, service: Service, store: ResponseStore) -> None:
        self._service, self._store = service, store

    async def create(self, body: ResponsesRequest, request: Request) -> Any:
        """Answer a conversation."""
        body.check()
        items = self._conversation(body)
        tools = ToolTable(body.tools or [])
        running = await self._begin(body, items, tools, request)
        response = Response.begun(body, running.answer, self._service.settings.replica)

        def keep(response: Response) -> None:
            if response.store:
                self._store.keep(response.model_dump(), items)

        if body.stream:
            return self._service.event_stream(running, events(running, response, tools, keep))
        async with running.lease:
            return await until_gone(request, whole(running, response, tools, keep))

    async def count(self, body: ResponsesRequest, request: Request) -> InputTokens:
        """The tokens of a request's prompt."""
        body.check()
        try:
            chat = chat_request(body, self._conversation(body), ToolTable(body.tools or []))
            return InputTokens(input_tokens=await until_gone(request, self._service.count_tokens(chat)))
        except APIError as error:
            raise in_our_words(error) from None

    def _conversation(self, body: ResponsesRequest) -> list[dict[str, Any]]:
        """The items to answer.

        Raises:
            APIError: An item is none, or an earlier response is not kept.
        """
        before: list[dict[str, Any]] = []
        if body.previous_response_id is not None:
            place = "previous_response_id"
            stored = self._store.get(body.previous_response_id)
            if stored is None:
                message = f"{place}: {_lost('response', body.previous_response_id)}; send the whole conversation"
                raise APIError(message, place, "previous_response_not_found")
            before = stored.conversation
        items = checked_items(body.input)
        for index, item in enumerate(items):
            if refers(item):
                kept = self._store.item(item["id"])
                if kept is None:
                    place = f"input.{index}"
                    raise APIError(f"{place}: {_lost('item', item['id'])}; send it itself", place, "item_not_found")
                items[index] = kept
        return [*before, *items]

    async def _begin(
        self, body: ResponsesRequest, items: list[dict[str, Any]], tools: ToolTable, request: Request
    ) -> Running:
        """Begin to answer; where truncation is `auto`, without the oldest turns if all are too long."""
        try:
            try:
                return await self._service.begin_chat(chat_request(body, items, tools), request)
            except APIError as error:
                if error.api_code != "context_length_exceeded" or body.truncation != "auto":
                    raise
            shorter = await until_gone(request, self._shorter(body, items, tools))
            return await self._service.begin_chat(chat_request(body, shorter, tools), request)
        except APIError as error:
            raise in_our_words(error) from None

    async def _shorter(
        self, body: ResponsesRequest, items: list[dict[str, Any]], tools: ToolTable
    ) -> list[dict[str, Any]]:
        """A conversation with as many of its last turns as leave room for the answer, the last one at least."""
        context = await self._service.context_length(body.model)
        room = context - min(body.max_output_tokens or context // 4, context // 2)
        shorter = _shorter(items)
        least, most = 0, len(shorter) - 1
        while least < most:
            middle = (least + most) // 2
            fits = await self._service.count_tokens(chat_request(body, shorter[middle], tools)) <= room
            least, most = (least, middle) if fits else (middle + 1, most)
        return shorter[least]

    def get(self, response_id: str, stream: Annotated[bool, Query()] = False) -> Response:
        """A response that is kept."""
        if stream:
            message = "stream: the events of a response are not kept; ask without it"
            raise APIError(message, "stream", "unsupported_parameter")
        return Response.model_validate(self._stored(response_id).response)

    def delete(self, response_id: str) -> Deleted:
        """Forget a response."""
        self._stored(response_id)
        self._store.forget(response_id)
        return Deleted(id=response_id)

    def input_items(
        self,
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[Literal["asc", "desc"], Query()] = "desc",
        after: Annotated[str | None, Query()] = None,
    ) -> ItemList:
        """The items that a response answers."""
        items = self._stored(response_id).items
        if order == "desc":
            items = items[::-1]
        if after is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise APIError(f"after: {_lost('item', after)}", "after", "item_not_found")
            items = items[ids.index(after) + 1 :]
        data = items[:limit]
        first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
        return ItemList(data=data, first_id=first, last_id=last, has_more=len(items) > limit)

    def _stored(self, response_id: str) -> Stored:
        stored = self._store.get(response_id)
        if stored is None:
            raise APIError(_lost("response", response_id), code="response_not_found", status=404)
        return stored


def _lost(kind: str, name: str) -> str:
    return f"no {kind} {name[:80]!r} is kept here; the server keeps the latest ones, unless store is false"


def _shorter(items: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """A conversation without its oldest turn, without two, and so on; the system's messages at its beginning stay."""
    begin = next((index for index, each in enumerate(items) if each.get("role") not in SYSTEM), len(items))
    starts = [index for index, each in enumerate(items) if index > begin and each.get("role") == "user"]
    return [[*items[:begin], *items[start:]] for start in starts] or [items]
