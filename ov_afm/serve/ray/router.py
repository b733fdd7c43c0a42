"""In front of the replicas: who answers, and what happens when he dies.

A request goes to the replica that has its conversation in the cache, else to one with little to do. Until the first
token another replica can take over unnoticed; after it the client is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.types import Message, Receive, Scope, Send

from ..errors import RETRY, APIError
from ..middleware import Guard

__all__ = ["Front", "conversation_of"]

logger = logging.getLogger(__name__)

ATTEMPTS = 3
# Before the second attempt, and twice as long before the third: a replica that is lost leaves its work to the others.
PAUSE_S = 0.25
# Full, or without an engine for the moment: another replica may not be.
ELSEWHERE = (429, 503)
# ASGI's fields that another process can use.
FIELDS = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client", "server")
PROMPT_CHARACTERS = 1024


class Conversation(NamedTuple):
    """What marks the requests that share a beginning.

    Attributes:
        key: A hash of it; empty where the body is not a generation's.
        goes_on: Some replica has it in its cache. What is new goes to the replica with the least to do: by its key Ray
            would send all that comes within a second to the same one.
    """

    key: str = ""
    goes_on: bool = False


def conversation_of(body: bytes) -> Conversation:
    """The conversation of a request: its model and its beginning up to the user's first words.

    The system prompt alone would send everyone to the same replica. Nothing is known of a completion's history; the
    same beginning of a long prompt is worth waiting for.
    """
    try:
        asked = json.loads(body)
        messages, beginning = asked.get("messages"), asked.get("prompt")
        goes_on = False
        if messages:
            first = next((at for at, message in enumerate(messages) if message.get("role") == "user"), 0)
            beginning, goes_on = messages[: first + 1], len(messages) > first + 1
        elif isinstance(beginning, str):
            goes_on = len(beginning) >= PROMPT_CHARACTERS
            beginning = beginning[:PROMPT_CHARACTERS]
    except (ValueError, RecursionError, AttributeError, TypeError):
        # The replica says what is wrong with it.
        return Conversation()
    if not beginning:
        return Conversation()
    key = json.dumps([asked.get("model"), beginning], sort_keys=True)
    return Conversation(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest(), goes_on)


class Front:
    """The application that Ray's proxies talk to.

    Args:
        replicas: Handle of the replicas.
        max_body_bytes: Longest body.
    """

    def __init__(self, replicas: DeploymentHandle[Any], max_body_bytes: int) -> None:
        self._replicas = replicas.options(stream=True, method_name="answer")
        self._max_body_bytes = max_body_bytes

    def __serve_build_asgi_app__(self) -> Any:
        """The application that Ray serves. Keys and JSON are checked by the replicas."""
        return Guard(self._call, api_keys=(), max_body_bytes=self._max_body_bytes, json_routes=frozenset())

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for step in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{step}.complete"})
            return
        if scope["type"] != "http":
            return
        body = (await receive())["body"]
        work = asyncio.create_task(_Relay(self._replicas, send).answer(scope, body))
        left = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not work.done():
                work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Relay:
    """One request on its way to a client.

    Args:
        replicas: Handle of the replicas' `answer`.
        send: ASGI's way to the client.
    """

    def __init__(self, replicas: DeploymentHandle[Any], send: Send) -> None:
        self._replicas, self._send = replicas, send
        self._started = self._spoken = False

    async def answer(self, scope: Scope, body: bytes) -> None:
        """Have one replica after the other answer until one does."""
        fields = {name: scope[name] for name in FIELDS if name in scope}
        conversation = conversation_of(body) if scope["method"] == "POST" else Conversation()
        for left in reversed(range(ATTEMPTS)):
            await asyncio.sleep(PAUSE_S * (ATTEMPTS - 1 - left))
            # The replica that knows the conversation is the first choice and no later one: it may be the one that died.
            home = conversation.key if conversation.goes_on and left == ATTEMPTS - 1 else ""
            try:
                if await self._relay(home, fields, body, conversation.key, last=not left):
                    return
            except BackPressureError:
                await self._fail(
                    APIError("too many requests are waiting", code="queue_full", status=429, headers=RETRY)
                )
                return
            except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
                logger.warning("a replica was lost: %s", " ".join(str(error).split())[:200])
                if self._spoken or not left:
                    lost = "the replica that answered is gone; ask again"
                    await self._fail(APIError(lost, code="engine_unavailable", status=503, headers=RETRY))
                    return

    async def _relay(self, home: str, fields: Mapping[str, Any], body: bytes, conversation: str, *, last: bool) -> bool:
        """Pass on what a replica answers, that which has the conversation `home` if any; false if another may."""
        messages = self._replicas.options(multiplexed_model_id=home).remote(fields, body, conversation)
        try:
            async for message in messages:
                if message["type"] == "http.response.start" and message["status"] in ELSEWHERE and not last:
                    return False
                await self._pass_on(message)
        finally:
            # Of one that is done it does nothing.
            messages.cancel()
        return True

    async def _pass_on(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self._started:
                # A stream that another replica had begun: what follows is more of it, or an error in its form.
                self._failed = message["status"] != 200
                return
            self._started, self._failed = True, False
        elif self._started and self._failed:
            message = {**message, "body": _event(message["body"])}
        self._spoken = self._spoken or (bool(message.get("body")) and not message["body"].startswith(b":"))
        await self._send(message)

    async def _fail(self, error: APIError) -> None:
        if self._started:
            await self._send({"type": "http.response.body", "body": _event(json.dumps(error.envelope).encode())})
            return
        response = error.response()
        await self._send(
            {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
        )
        await self._send({"type": "http.response.body", "body": response.body})


def _event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n" if body else body
