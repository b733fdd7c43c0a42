"""The server's metrics, for Prometheus."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .engine import Engine

__all__ = ["Metrics", "RequestCounter"]

TTFT_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
TPOT_BUCKETS_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.12, 0.16, 0.24, 0.32, 0.64, 1.28, 2.56)
# Attribute of an engine, name and description of its gauge.
GAUGES = (
    ("running", "running_requests", "Requests that have a slot"),
    ("waiting", "queued_requests", "Requests that wait for a slot"),
    ("cache_usage", "kv_cache_usage_ratio", "Share of the KV cache in use"),
    ("restarts", "engine_restarts", "Times that the engine was started again after it died"),
    ("is_ready", "engine_ready", "1 while the engine takes requests"),
)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ov_afm_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"ov_afm_{name}", text, ["model"], buckets=buckets, registry=self.registry)

        self.requests = counter("requests", "HTTP requests", "route", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "model")
        self.generated_tokens = counter("generated_tokens", "Tokens generated", "model")
        self.ttft_s = histogram("ttft_seconds", "Time to the first token", TTFT_BUCKETS_S)
        per_token = "Time per token after the first, mean of a request"
        self.tpot_s = histogram("tpot_seconds", per_token, TPOT_BUCKETS_S)
        self._gauges = {
            attribute: Gauge(f"ov_afm_{name}", text, ["model"], registry=self.registry)
            for attribute, name, text in GAUGES
        }

    def watch(self, model: str, engine: Engine) -> None:
        """Read the gauges of a model whenever the metrics are read."""
        for attribute, gauge in self._gauges.items():
            gauge.labels(model).set_function(functools.partial(getattr, engine, attribute))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class RequestCounter:
    """ASGI middleware that counts answers by route and status.

    Args:
        app: The application behind it.
        metrics: Where to count.
        routes: Paths to count by name; all others count as `other`.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and count its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._routes else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(route, str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counted)
