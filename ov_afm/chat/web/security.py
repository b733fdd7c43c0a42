"""What the page may show, load and give away: text of a model stays text, and no file can be read or uploaded."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from ..terminal_markdown import fenced_lines

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["SecurityMiddleware", "neutralize", "original"]

# Nothing from other sites: no image, script, font, frame or connection. Gradio's page needs its inline parts.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
# Gradio's routes to the disk and to other machines. The page needs none of them.
CLOSED = re.compile(r"/(file[=/]|proxy=|upload|stream/|component_server|deep_link|mcp|dev/)")
LOOPBACK = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")
# A code span, which stays as it is; a character that opens a tag, as that of "a < b" does not; and that of an image.
CODE_OR_MARK = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)|<(?=[A-Za-z/!?])|!\[", re.DOTALL)
AS_TEXT = {"<": "&lt;", "![": "!\\["}


def neutralize(text: str) -> str:
    """Markdown from outside with HTML and images made visible as text; code is left as it is."""
    parts = []
    for is_code, lines in itertools.groupby(fenced_lines(text), key=lambda each: each[1]):
        part = "".join(line for line, _ in lines)
        parts.append(part if is_code else CODE_OR_MARK.sub(lambda found: AS_TEXT.get(found[0], found[0]), part))
    return "".join(parts)


def original(text: str) -> str:
    """The text that `neutralize` was given; for a question that is edited."""
    return text.replace("&lt;", "<").replace("!\\[", "![")


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
            await self.app(scope, receive, _with_headers(send))


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *HEADERS]
        await send(message)

    return wrapped
