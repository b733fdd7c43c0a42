"""The models on offer: engines by the names that clients use, loaded when they are needed."""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ..model_dir.text_encoder import EMBEDDING, RERANKING, TEXT_GENERATION
from .engine import Engine
from .errors import APIError
from .messages import EngineSpec

__all__ = ["Limits", "Models"]

logger = logging.getLogger(__name__)
MAX_NAME_CHARACTERS = 100
PURPOSES = {TEXT_GENERATION: "text generation", EMBEDDING: "embeddings", RERANKING: "reranking"}
EXPORT_HINTS = {
    TEXT_GENERATION: "serve one with --model NAME=DIR",
    **{
        task: f"export one with ov-afm export MODEL --task {task} and serve it with --model NAME=DIR"
        for task in (EMBEDDING, RERANKING)
    },
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the service.

    Attributes:
        max_queue: Requests that may wait for a slot.
        request_timeout_s: Longest time for a request.
        grace_s: Time that running requests get to finish when the server is stopped.
        idle_unload_s: Seconds after which an unused model is unloaded; None keeps it.
    """

    max_queue: int = 64
    request_timeout_s: float = 600
    grace_s: float = 30
    idle_unload_s: float | None = None


class Models:
    """Engines by name, none of them started yet.

    Args:
        specs: What to load, by the name that clients use; the first is the default.
        limits: Bounds of the service.
        aliases: More names, each with the model that it means; `*` and `?` in one stand for other characters.
    """

    def __init__(
        self, specs: Mapping[str, EngineSpec], limits: Limits, aliases: Mapping[str, str] | None = None
    ) -> None:
        self.engines = {
            name: Engine(spec, max_queue=limits.max_queue, request_timeout_s=limits.request_timeout_s)
            for name, spec in specs.items()
        }
        self.aliases = dict(aliases or {})
        self.created = int(time.time())
        self._idle_unload_s = limits.idle_unload_s
        self._janitor: asyncio.Task[None] | None = None
        # A model must not be used while it is being unloaded.
        self._loading = asyncio.Lock()

    @property
    def lazy(self) -> bool:
        """Whether models are loaded on first use: when there are several, or they are unloaded."""
        return len(self.engines) > 1 or self._idle_unload_s is not None

    def start(self) -> None:
        """Load the only model, or begin to watch for idle ones."""
        if not self.lazy:
            next(iter(self.engines.values())).start()
        if self._idle_unload_s is not None:
            self._janitor = asyncio.create_task(self._unload_idle(self._idle_unload_s))

    async def stop(self) -> None:
        """End all engines."""
        if self._janitor:
            self._janitor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._janitor
        await asyncio.gather(*(engine.stop() for engine in self.engines.values()))

    def resolve(self, name: str | None, task: str | None = TEXT_GENERATION) -> str:
        """The name of a model on offer; a request without one means the first that can do its task.

        Models come before aliases, and aliases before patterns. Clients of Ollama add `:latest` to names.

        Args:
            name: As the client gave it.
            task: What the model must be for; None takes any.

        Raises:
            APIError: There is no such model, or it is for something else.
        """
        able = [each for each in self.engines if task in (None, self.task(each))]
        found = self._find(name) if name is not None else next(iter(able), None)
        if found is not None and found in able:
            return found
        asked = "the model" if name is None else f"model {name[:MAX_NAME_CHARACTERS]!r}"
        others = f"there are: {', '.join(able)}" if able else f"none here can ({EXPORT_HINTS[str(task)]})"
        what = f"; it is for {PURPOSES[self.task(found)]}" if found else ""
        raise APIError(f"{asked} cannot do {PURPOSES[str(task)]}{what}; {others}", "model", "model_not_suitable")

    def task(self, name: str) -> str:
        """What a model on offer is for."""
        encoder = self.engines[name].spec.text_encoder
        return encoder.task if encoder else TEXT_GENERATION

    def _find(self, name: str) -> str:
        known = {**self.aliases, **{each: each for each in self.engines}}
        for each in (name, name.removesuffix(":latest")):
            if each in known:
                return known[each]
        for pattern, model in self.aliases.items():
            if fnmatch.fnmatchcase(name, pattern):
                return model
        message = (
            f"no model {name[:MAX_NAME_CHARACTERS]!r} here; there are: {', '.join([*self.engines, *self.aliases])}"
        )
        raise APIError(message, "model", "model_not_found", status=404)

    async def engine(self, name: str) -> Engine:
        """A model's engine, loaded now if models are loaded on first use."""
        engine = self.engines[name]
        engine.last_used = time.monotonic()
        async with self._loading:
            if self.lazy and engine.state == "stopped":
                engine.start()
        if self.lazy and engine.state == "loading":
            await engine.ready()
        return engine

    def status(self) -> tuple[bool, str]:
        """Whether the server takes requests, and a word for its state."""
        states = [engine.state for engine in self.engines.values()]
        state = states[0]
        if self.lazy:
            state = "dead" if "dead" in states else "ready"
        return state == "ready", "ok" if state == "ready" else state

    async def _unload_idle(self, idle_s: float) -> None:
        while True:
            await asyncio.sleep(min(idle_s, 1.0))
            for name, engine in self.engines.items():
                async with self._loading:
                    quiet = engine.state == "ready" and not engine.running and not engine.waiting
                    if quiet and time.monotonic() - engine.last_used >= idle_s:
                        logger.info("unloading %s after %g s without a request", name, idle_s)
                        await engine.stop()
