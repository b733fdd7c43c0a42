"""A Ray Serve replica: the application of one machine with its engine, called through Ray instead of a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from ray import serve

from ...errors import DeviceError
from ..app import Settings, build
from ..messages import EngineSpec
from ..registry import Limits, Models
from .router import replica_tag

__all__ = ["Replica"]

# Most conversations that Ray remembers for a replica.
CONVERSATIONS = 256


class Replica:
    """One replica: started by Ray, ready when its model is.

    Args:
        specs: What to load, by name.
        limits: Bounds of the service.
        settings: How to behave.

    Raises:
        DeviceError: The model cannot be loaded here.
    """

    async def __init__(self, specs: Mapping[str, EngineSpec], limits: Limits, settings: Settings) -> None:  # type: ignore[misc]
        self._name = serve.get_replica_context().replica_id.unique_id
        self._tag = replica_tag(self._name)
        self._models = Models(specs, limits, settings.aliases)
        self._app = build(self._models, replace(settings, replica=self._tag))
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()
        if not self._models.lazy:
            await asyncio.gather(*(engine.ready() for engine in self._models.engines.values()))
            await self.check_health()

    async def __del__(self) -> None:
        """End the engines; Ray awaits it."""
        await self._lifespan.__aexit__(None, None, None)

    async def check_health(self) -> None:
        """Raise if Ray must replace this replica.

        Raises:
            DeviceError: An engine can never be loaded here.
        """
        for engine in self._models.engines.values():
            if engine.problem is not None:
                raise DeviceError(engine.problem)

    @serve.multiplexed(max_num_models_per_replica=CONVERSATIONS)  # type: ignore[untyped-decorator]
    async def _remember(self, conversation: str) -> str:
        return conversation

    async def answer(
        self, scope: Mapping[str, Any], body: bytes, conversation: str
    ) -> AsyncIterator[Mapping[str, Any]]:
        """Answer a request.

        Args:
            scope: ASGI's description of the request.
            body: Its whole body.
            conversation: Key that Ray remembers: this replica has the conversation in its cache from now on.

        Yields:
            ASGI's messages of the response; the header `X-Replica` names the replica.
        """
        # Ray forgets what was longest unused; what only this replica can answer must always find it.
        await self._remember(self._tag)
        if conversation:
            await self._remember(conversation)
        name = self._name.encode()
        messages: asyncio.Queue[Mapping[str, Any] | None] = asyncio.Queue()
        unread, disconnected = [body], asyncio.Event()

        async def receive() -> dict[str, Any]:
            if unread:
                return {"type": "http.request", "body": unread.pop(), "more_body": False}
            await disconnected.wait()
            return {"type": "http.disconnect"}

        work = asyncio.create_task(self._app(dict(scope), receive, messages.put))
        work.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message["headers"], (b"x-replica", name)]}
                yield message
        finally:
            # The application frees what the request held, as when a client disconnects.
            disconnected.set()
        await work
