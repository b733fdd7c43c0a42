"""Chooses the replica that answers a request, and another one when it dies.

A request goes to the replica that has its conversation in the cache, else to one with little to do. Until the first
token another replica can take over without the client noticing; after it the client gets an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from ..answers import until_gone
from ..errors import RETRY, APIError
from ..middleware import BodyChecks

__all__ = ["Router", "conversation_of", "keeper_of", "replica_tag"]

logger = logging.getLogger(__name__)

ATTEMPTS = 3
# Pause before the second attempt, doubled before the third: the others get the work of a lost replica all at once.
PAUSE_S = 0.25
# The replica is full, or its engine is being restarted: another replica may be able to answer.
TRY_ANOTHER = (429, 503)
# The fields of an ASGI scope that can be sent to another process.
FIELDS = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
PROMPT_CHARACTERS = 1024
RESPONSES = "/v1/responses"
# Only the replica that made a response keeps it, and the response's id names the replica.
RESPONSE_ID = re.compile(r"resp_([0-9a-f]{16})[0-9a-f]{48}")


class Conversation(NamedTuple):
    """What marks the requests that share a beginning.

    Attributes:
        key: A hash of it; empty if the request generates nothing.
        cached: Some replica has it in its cache. New conversations go to the replica with the least to do, without
            their key: by key Ray would send all that arrive within a second to the same one.
    """

    key: str = ""
    cached: bool = False


def conversation_of(body: bytes) -> Conversation:
    """The conversation of a request: its model and its beginning up to the user's first words.

    The system prompt alone would send everyone to the same replica. A completion has no history, but a long prompt that
    begins like an earlier one saves time where that one is cached.
    """
    try:
        request = json.loads(body)
        messages, beginning = request.get("messages"), request.get("prompt")
        items = request.get("input")
        if isinstance(items, list) and items:
            messages = items
        elif isinstance(items, str):
            beginning = items
        cached = False
        if messages:
            first = next((index for index, message in enumerate(messages) if message.get("role") == "user"), 0)
            beginning, cached = messages[: first + 1], len(messages) > first + 1
        elif isinstance(beginning, str):
            cached = len(beginning) >= PROMPT_CHARACTERS
            beginning = beginning[:PROMPT_CHARACTERS]
    except (ValueError, RecursionError, AttributeError, TypeError):
        # The replica answers with what is wrong.
        return Conversation()
    if not beginning:
        return Conversation()
    key = json.dumps([request.get("model"), beginning], sort_keys=True)
    return Conversation(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest(), cached)


def replica_tag(name: str) -> str:
    """What the ids of a replica's responses begin with, and Ray's key for what only this replica can answer."""
    return hashlib.blake2b(name.encode(), digest_size=8).hexdigest()


def keeper_of(path: str, body: bytes) -> str:
    """The tag of the replica that keeps the response which a request needs; empty where it needs none."""
    if path in (RESPONSES, f"{RESPONSES}/input_tokens"):
        try:
            name = json.loads(body).get("previous_response_id")
        except (ValueError, RecursionError, AttributeError):
            return ""
    else:
        name = path.removeprefix(f"{RESPONSES}/").partition("/")[0]
    match = RESPONSE_ID.fullmatch(name) if isinstance(name, str) else None
    return match[1] if match else ""


class Router:
    """The application that Ray's proxies talk to.

    Args:
        replicas: Handle of the replicas.
        max_body_bytes: Longest body.
    """

    def __init__(self, replicas: DeploymentHandle[Any], max_body_bytes: int) -> None:
        self._replicas = replicas.options(stream=True, method_name="answer")
        self._max_body_bytes = max_body_bytes
        self._draining, self._running = False, 0

    async def drain(self) -> tuple[str, int]:
        """Refuse further requests; returns the router's name, and how many requests it still answers."""
        self._draining = True
        return str(serve.get_replica_context().replica_id.unique_id), self._running

    def __serve_build_asgi_app__(self) -> Any:
        """The application that Ray serves. Keys and JSON are checked by the replicas."""
        return BodyChecks(self._call, max_body_bytes=self._max_body_bytes)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        if scope["type"] != "http":
            return
        body = (await receive())["body"]
        relay = _Relay(self._replicas, scope, receive, send)
        if self._draining:
            ending = "the server is being stopped; ask again"
            await relay.fail(APIError(ending, code="engine_unavailable", status=503, headers=RETRY))
            return
        self._running += 1
        try:
            with contextlib.suppress(APIError):
                await until_gone(Request(scope, receive), relay.answer(body))
        finally:
            self._running -= 1


class _Relay:
    """One request on its way to a client.

    Args:
        replicas: Handle of the replicas' `answer`.
        scope: ASGI's description of the request.
        receive: ASGI's way from the client.
        send: ASGI's way to the client.
    """

    def __init__(self, replicas: DeploymentHandle[Any], scope: Scope, receive: Receive, send: Send) -> None:
        self._replicas, self._scope, self._receive, self._send = replicas, scope, receive, send
        self._started = self._has_text = False

    async def answer(self, body: bytes) -> None:
        """Try one replica after the other until one answers."""
        fields = {name: self._scope[name] for name in FIELDS if name in self._scope}
        conversation = conversation_of(body) if self._scope["method"] == "POST" else Conversation()
        if keeper := keeper_of(self._scope["path"], body):
            conversation = Conversation()
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            await asyncio.sleep(PAUSE_S * attempt)
            # Only the first attempt goes to the replica that has the conversation: it may be the one that died.
            home = keeper or (conversation.key if conversation.cached and attempt == 0 else "")
            try:
                if await self._relay(home, fields, body, conversation.key, only=keeper, last=last):
                    return
            except BackPressureError:
                full = "too many requests are waiting"
                await self.fail(APIError(full, code="queue_full", status=429, headers=RETRY))
                return
            except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
                logger.warning("a replica was lost: %s", " ".join(str(error).split())[:200])
                if self._has_text or last:
                    lost = "the replica that answered is gone; ask again"
                    await self.fail(APIError(lost, code="engine_unavailable", status=503, headers=RETRY))
                    return

    async def _relay(
        self, home: str, fields: Mapping[str, Any], body: bytes, conversation: str, *, only: str, last: bool
    ) -> bool:
        """Pass on the answer of the replica with the conversation `home`, or of any; false to try another.

        Where `only` one can answer, what another says is no answer, and "full" from the right one is.
        """
        messages = self._replicas.options(multiplexed_model_id=home).remote(fields, body, conversation)
        try:
            async for message in messages:
                if message["type"] == "http.response.start" and not last:
                    another = _replica(message) != only if only else message["status"] in TRY_ANOTHER
                    if another:
                        return False
                await self._pass_on(message)
        finally:
            # Without effect on a request that is complete.
            messages.cancel()
        return True

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._started:
                # Another replica had begun this stream: now comes more of it, or an error that must become an event.
                self._failed = message["status"] != 200
                return
            self._started, self._failed = True, False
        elif self._started and self._failed:
            message = {**message, "body": _event(message["body"], self._scope["path"])}
        self._has_text = self._has_text or (bool(message.get("body")) and not message["body"].startswith(b":"))
        await self._send(message)

    async def fail(self, error: APIError) -> None:
        """Answer with an error, or end the stream with it."""
        if self._started:
            path = self._scope["path"]
            body = _event(json.dumps(error.body(path)).encode(), path)
            await self._send({"type": "http.response.body", "body": body})
        else:
            await error.response(self._scope["path"])(self._scope, self._receive, self._send)


def _replica(start: Message) -> str:
    """The tag of the replica that answers."""
    return next((replica_tag(value.decode()) for name, value in start["headers"] if name == b"x-replica"), "")


def _event(body: bytes, path: str) -> bytes:
    """An error within a stream, as the API of this path has it."""
    if not body or path.startswith("/api/"):
        return body and body + b"\n"
    name = b"event: error\n" if path.startswith("/v1/messages") else b""
    return name + b"data: " + body + b"\n\n"
