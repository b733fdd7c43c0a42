"""What a request must pass before any route sees it: key, size, and a body that is sound JSON.

The body is read once here and checked as text, because Python's JSON parser accepts more than the
protocol: NaN, halves of surrogate pairs and endless nesting are refused here.
"""

from __future__ import annotations

import hmac
import json
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import APIError

__all__ = ["RequestChecks"]

OPEN_ROUTES = ("/health",)
MAX_DEPTH = 64


class RequestChecks:
    """ASGI middleware.

    Args:
        app: The application behind it.
        api_keys: A request must send one of these keys; empty to let everyone in.
        max_body_bytes: Longest body.
        json_routes: Paths whose POST takes a JSON object.
    """

    def __init__(
        self, app: ASGIApp, *, api_keys: tuple[str, ...], max_body_bytes: int, json_routes: frozenset[str]
    ) -> None:
        self._app, self._max_body_bytes, self._json_routes = app, max_body_bytes, json_routes
        self._keys = tuple(key.encode() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on, or answer it with an error."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            self._check_key(request)
            body = await self._read(request)
            if body is None:
                return
            if request.method == "POST" and scope["path"] in self._json_routes:
                check_json(body, request.headers.get("content-type", ""))
        except APIError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _check_key(self, request: Request) -> None:
        if not self._keys or request.scope["path"] in OPEN_ROUTES:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        sent = key.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" else b""
        # All keys are compared: the time taken must not show which one was nearly right.
        if not any([hmac.compare_digest(sent, allowed) for allowed in self._keys]):
            message = "this server needs an API key: send it as Authorization: Bearer KEY"
            raise APIError(message, code="invalid_api_key", status=401, headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request) -> bytes | None:
        """The whole body; None when the client left before it was complete."""
        declared = request.headers.get("content-length", "")
        declared_bytes = int(declared) if declared.isdigit() else 0
        body = bytearray()
        while max(declared_bytes, len(body)) <= self._max_body_bytes:
            part = await request.receive()
            if part["type"] == "http.disconnect":
                return None
            body += part.get("body", b"")
            if not part.get("more_body", False) and len(body) <= self._max_body_bytes:
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
