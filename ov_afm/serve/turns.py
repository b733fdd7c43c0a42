"""Only a few tasks work between two looks of the event loop at its sockets.

An event loop does all that is ready before it looks for anything new. Where sixty streams have a token each, or sixty
requests come at once, that is a tenth of a second of work, several times over for somebody who only asks whether the
server is well. So requests and tokens wait for their turn, in order, and `/health` does not.
"""

from __future__ import annotations

import asyncio
import collections

from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["RequestTurns", "Turns"]

AT_ONCE = 4
# Answered without work.
AT_ANY_TIME = frozenset({"/health", "/api/version", "/version"})


class Turns:
    """A queue of tasks, of which so many go on in each round of the event loop."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = self._left = at_once
        self._queue: collections.deque[asyncio.Future[None]] = collections.deque()
        self._armed = False

    async def take(self) -> None:
        """Wait for a turn."""
        loop = asyncio.get_running_loop()
        if self._left and not self._queue:
            self._left -= 1
            self._arm(loop)
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._queue.append(turn)
        self._arm(loop)
        await turn

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._armed:
            self._armed = True
            loop.call_soon(self._next_round, loop)

    def _next_round(self, loop: asyncio.AbstractEventLoop) -> None:
        self._armed, self._left = False, self._at_once
        while self._queue and self._left:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                self._left -= 1
        if self._left < self._at_once:
            self._arm(loop)


class RequestTurns:
    """ASGI middleware: requests begin in turns."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._turns = app, Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] == "http" and scope["path"] not in AT_ANY_TIME:
            await self._turns.take()
        await self._app(scope, receive, send)
