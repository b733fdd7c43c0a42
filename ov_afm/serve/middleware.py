"""What a request must pass before any route sees it: key, size, and a body that is sound JSON.

The body is read here once and checked as text, because a JSON parser's tolerance is not the
protocol's: NaN, halves of surrogate pairs and nesting without end are refused where they arrive.
"""

from __future__ import annotations

import hmac
import json
from typing import Any, NoReturn

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import WireError

__all__ = ["Guard"]

OPEN_ROUTES = ("/health",)
DEEPEST = 64


class Guard:
    """ASGI middleware.

    Args:
        app: The application behind it.
        api_keys: Keys of which a request must show one; none asks for none.
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
        except WireError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    def _check_key(self, request: Request) -> None:
        if not self._keys or request.url.path in OPEN_ROUTES:
            return
        kind, _, shown = request.headers.get("authorization", "").partition(" ")
        given = shown.strip().encode("utf-8", "surrogateescape") if kind.lower() == "bearer" else b""
        # No early exit: the time taken must not tell which key was nearly right.
        if not any([hmac.compare_digest(given, key) for key in self._keys]):
            message = "this server needs an API key: send it as Authorization: Bearer KEY"
            raise WireError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read(self, request: Request) -> bytes | None:
        """The whole body; None when the client left before it was complete."""
        too_long = WireError(
            413,
            f"the body is longer than {self._max_body_bytes} bytes",
            code="body_too_large",
            headers={"Connection": "close"},
        )
        declared = request.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            raise too_long
        body = bytearray()
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max_body_bytes:
                raise too_long
            if not message.get("more_body", False):
                return bytes(body)


def check_json(body: bytes, content_type: str) -> None:
    """Refuse a body that is not one sound JSON object.

    Raises:
        WireError: 415 for another type, 400 for anything else.
    """
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise WireError(415, "the body must be sent with Content-Type: application/json", code="unsupported_media_type")
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant)
        _check_depth(value)
        # Halves of surrogate pairs are legal escapes and illegal text.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeDecodeError as error:
        raise WireError(400, f"the body is not UTF-8: bad byte at offset {error.start}", code="invalid_json") from None
    except UnicodeEncodeError:
        raise WireError(
            400, "the body holds half of a surrogate pair, which is no character", code="invalid_json"
        ) from None
    except RecursionError:
        raise WireError(400, f"the body is nested deeper than {DEEPEST} levels", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise WireError(
            400, f"the body is not JSON: {error.msg} at character {error.pos}", code="invalid_json"
        ) from None
    except ValueError as error:
        raise WireError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise WireError(400, f"the body must be a JSON object, found {type(value).__name__}", code="invalid_json")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            each
            for node in level
            if isinstance(node, (dict, list))
            for each in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise RecursionError


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then whatever comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
