"""What the page may show, load and give away: text of a model stays text, and no file can be read or uploaded."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["SecurityMiddleware"]

# Nothing from other sites: no image, script, font, frame or connection. Gradio's page needs inline styles, and makes
# functions of its own texts. Of inline scripts those run that the page was sent with; `{scripts}` are their hashes.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'{scripts}; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))
INLINE_SCRIPT = re.compile(rb"<script(?![^>]*\ssrc=)[^>]*>(.*?)</script>", re.DOTALL)
# Gradio's routes to the disk and to other machines. The page needs none of them.
CLOSED = re.compile(r"/(file[=/]|proxy=|upload|stream/|component_server|deep_link|mcp|dev/)")
LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")


class SecurityMiddleware:
    """Middleware before Gradio.

    Args:
        app: Gradio's application.
        loopback: Answer only requests that were addressed to this machine by its own names, so that another site
            whose name resolves to this machine (DNS rebinding) cannot reach it.
    """

    def __init__(self, app: ASGIApp, loopback: bool = True) -> None:
        self.app, self.loopback = app, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if self.loopback and not LOOPBACK.fullmatch(host):
            reason = "this chat answers on 127.0.0.1 only; start it with --host and --auth"
            await PlainTextResponse(reason, 421)(scope, receive, send)
        elif CLOSED.search(scope["path"]):
            await PlainTextResponse("this chat gives no files away", 403)(scope, receive, send)
        else:
            # A compressed page could not be read here.
            headers = [each for each in scope["headers"] if each[0] != b"accept-encoding"]
            await self.app({**scope, "headers": headers}, receive, _with_headers(send))


def _with_headers(send: Send) -> Send:
    """Add the headers; those of a page wait for its text, whose scripts they name."""
    start: Message = {}
    page = bytearray()

    async def wrapped(message: Message) -> None:
        nonlocal start
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *HEADERS]
            content_type = dict(message["headers"]).get(b"content-type", b"")
            if content_type.startswith(b"text/html"):
                start = message
                return
            message["headers"].append((b"content-security-policy", _policy(b"")))
        elif start and message["type"] == "http.response.body":
            page.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            start["headers"].append((b"content-security-policy", _policy(bytes(page))))
            await send(start)
            message = {"type": "http.response.body", "body": bytes(page)}
        await send(message)

    return wrapped


def _policy(page: bytes) -> bytes:
    """The content policy of a page with these inline scripts."""
    hashes = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in INLINE_SCRIPT.findall(page))
    return POLICY.format(scripts="".join(f" 'sha256-{each}'" for each in hashes)).encode()
