"""What the page may show, load and give away: text of a model stays text, and no file can be read or uploaded."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ..terminal_markdown import FENCE

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
# A character that opens a tag; that of "a < b" does not.
TAG = re.compile(r"<(?=[A-Za-z/!?])")
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Any, Send], Awaitable[None]]


def neutralize(text: str) -> str:
    """Markdown from outside with HTML and images made visible as text; code is left as it is."""
    parts: list[str] = []
    prose: list[str] = []
    fence = ""
    for line in text.splitlines(keepends=True):
        mark = FENCE.match(line)
        if fence:
            parts.append(line)
            if mark and mark[1].startswith(fence) and not line[mark.end() :].strip():
                fence = ""
        elif mark:
            parts += [_escape("".join(prose)), line]
            prose, fence = [], mark[1]
        else:
            prose.append(line)
    return "".join([*parts, _escape("".join(prose))])


def _escape(prose: str) -> str:
    done, position = [], 0
    for span in CODE_SPAN.finditer(prose):
        done += [_inert(prose[position : span.start()]), span[0]]
        position = span.end()
    return "".join([*done, _inert(prose[position:])])


def _inert(text: str) -> str:
    return TAG.sub("&lt;", text).replace("![", "!\\[")


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

    def __init__(self, app: App, loopback: bool = True) -> None:
        self.app, self.loopback = app, loopback

    async def __call__(self, scope: Scope, receive: Any, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        host = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
        if self.loopback and not LOOPBACK.fullmatch(host):
            await _refuse(send, 421, "this chat answers on 127.0.0.1 only; start it with --host and --auth")
        elif CLOSED.search(scope["path"]):
            await _refuse(send, 403, "this chat gives no files away")
        else:
            await self.app(scope, receive, _with_headers(send))


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *HEADERS]
        await send(message)

    return wrapped


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
