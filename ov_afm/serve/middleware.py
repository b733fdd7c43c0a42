"""What a request must pass before any route sees it: who asks, for what, and a body that is sound JSON.

The body is read once here and checked as text, because Python's JSON parser accepts more than the
protocol: NaN, halves of surrogate pairs and endless nesting are refused here.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Collection
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import APIError
from .hosts import HostRules, read_host
from .routes import RouteTable

__all__ = ["BodyChecks", "RequestChecks"]

OPEN_ROUTES = ("/health",)
MAX_DEPTH = 64
# Time for a body, as Apache's mod_reqtimeout measures it: so long, and a second more for so many bytes that have come.
BODY_S = 20.0
LEAST_BYTES_PER_S = 500


class RequestChecks:
    """ASGI middleware that answers what no route needs to see: hosts, keys, wrong paths and methods.

    Paths are taken from the scope, never from a URL: Starlette makes URLs of the header `Host`, which a client may
    write as it likes (CVE-2026-48710).

    Args:
        app: The application behind it.
        api_keys: A request must send one of these keys; empty to let everyone in.
        hosts: Hosts and origins that may ask; None for all.
        routes: What the application answers.
    """

    def __init__(self, app: ASGIApp, *, api_keys: tuple[str, ...], hosts: HostRules | None, routes: RouteTable) -> None:
        self._app, self._hosts, self._routes = app, hosts, routes
        self._keys = tuple(key.encode() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            read_host(scope["headers"])
            if self._hosts is not None:
                self._hosts.check(scope["headers"])
            self._check_key(scope)
            self._check_upgrade(scope)
            methods = self._routes.methods(scope)
            self._routes.check_method(scope, methods)
        except APIError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        if scope["method"] == "OPTIONS":
            await Response(status_code=204, headers={"Allow": ", ".join(methods)})(scope, receive, send)
        elif scope["method"] == "HEAD":
            await self._app({**scope, "method": "GET"}, receive, _without_body(send))
        else:
            await self._app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN_ROUTES:
            return
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Anthropic's clients have a header of their own for the key.
        bearer = key if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        sent = bearer.strip().encode("utf-8", "surrogateescape")
        # All keys are compared: the time taken must not show which one was nearly right.
        if not any([hmac.compare_digest(sent, allowed) for allowed in self._keys]):
            message = "this server needs an API key: send it as Authorization: Bearer KEY"
            raise APIError(message, code="invalid_api_key", status=401, headers={"WWW-Authenticate": "Bearer"})

    def _check_upgrade(self, scope: Scope) -> None:
        if "websocket" in Headers(scope=scope).get("upgrade", "").lower():
            message = "this server does not speak WebSocket; send a plain HTTP request"
            raise APIError(message, code="websocket_unavailable")


class BodyChecks:
    """ASGI middleware that reads the whole body: its size, the time that it takes, its encoding, its JSON.

    Args:
        app: The application behind it.
        max_body_bytes: Longest body.
        takes_json: Paths whose POST takes a JSON object.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, takes_json: Collection[str] = ()) -> None:
        self._app, self._max_body_bytes, self._takes_json = app, max_body_bytes, takes_json

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request's body and pass it on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            encoding = headers.get("content-encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                message = f"the body is encoded as {encoding[:40]!r}; send it without Content-Encoding"
                raise APIError(
                    message, code="unsupported_encoding", status=415, headers={"Accept-Encoding": "identity"}
                )
            body = await self._read(headers.get("content-length", ""), receive)
            if body is None:
                return
            if scope["method"] == "POST" and scope["path"] in self._takes_json:
                check_json(body, headers.get("content-type", ""))
        except APIError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _read(self, declared: str, receive: Receive) -> bytes | None:
        """The whole body; None when the client left before it was complete."""
        declared_bytes = int(declared) if declared.isdigit() else 0
        body, begun = bytearray(), time.monotonic()
        while max(declared_bytes, len(body)) <= self._max_body_bytes:
            late = begun + BODY_S + len(body) / LEAST_BYTES_PER_S
            try:
                part = await asyncio.wait_for(receive(), late - time.monotonic())
            except asyncio.TimeoutError:
                message = f"the body came too slowly: {len(body)} bytes in {time.monotonic() - begun:.0f} s"
                raise APIError(message, code="timeout", status=408, headers={"Connection": "close"}) from None
            if part["type"] == "http.disconnect":
                return None
            body += part.get("body", b"")
            if not part.get("more_body", False) and len(body) <= self._max_body_bytes:
                if len(body) < declared_bytes:
                    # httptools, which Ray's proxies use, drops the body of a client that offers HTTP/2.
                    message = f"the body has {len(body)} of {declared_bytes} bytes; offer no upgrade to HTTP/2 (h2c)"
                    raise APIError(message, code="incomplete_body", headers={"Connection": "close"})
                return bytes(body)
        message = f"the body is longer than {self._max_body_bytes} bytes"
        raise APIError(message, code="body_too_large", status=413, headers={"Connection": "close"})


def check_json(body: bytes, content_type: str) -> None:
    """Refuse a body that is not one sound JSON object.

    Raises:
        APIError: 415 for another type, 400 for anything else.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        message = "the body must be sent with Content-Type: application/json"
        raise APIError(message, code="unsupported_media_type", status=415)
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant)
        _check_depth(value)
        # Halves of surrogate pairs are legal escapes and illegal text.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise APIError(f"the body {_fault(error)}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise APIError(f"the body must be a JSON object, found {type(value).__name__}", code="invalid_json")


def _fault(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8: bad byte at offset {error.start}"
    if isinstance(error, UnicodeEncodeError):
        return "holds half of a surrogate pair, which is no character"
    if isinstance(error, RecursionError):
        return f"is nested deeper than {MAX_DEPTH} levels"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error.msg} at character {error.pos}"
    return f"is not JSON: {error}"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [node for node in level if isinstance(node, (dict, list))]
        level = [each for node in containers for each in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return
    raise RecursionError


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body that was read, then what the client sends next."""
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return unread.pop() if unread else await receive()

    return replay


def _without_body(send: Send) -> Send:
    """A `send` that leaves the body of the answer out, as HEAD wants it."""

    async def head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return head
