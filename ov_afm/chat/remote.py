"""A model behind an OpenAI-compatible URL: `ov-afm serve`, or any other server of that kind."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import ConfigError, GenerationError
from ..pipeline import Message
from ..runtime.metrics import RequestMetrics
from ..runtime.sampling import Params
from .backend import Info, Step, fit, prompt_limit

__all__ = ["Remote"]

CONNECT_S = 10.0
# A long prompt may wait in the server's queue and then be computed for minutes.
READ_S = 600.0
# Fields of Params that are no fields of a request, or have another name there.
OTHER_FIELDS = ("max_new_tokens", "stop", "greedy", "ignore_eos")


class Remote:
    """A server.

    Args:
        url: Its address up to `/v1`.
        model: The model's name there; None takes the first.
        api_key: Key to send.

    Raises:
        ConfigError: The address is not an HTTP address, or the server has no such model.
        GenerationError: The server does not answer, or not as OpenAI's do.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        import httpx

        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url takes an address such as http://127.0.0.1:8000/v1, found {url!r}", code="url")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(READ_S, connect=CONNECT_S))
        names = [str(each["id"]) for each in self._call("GET", f"{self.url}/models")["data"]]
        if not names or (model is not None and model not in names):
            raise ConfigError(
                f"{self.url} has no model {model or ''}; it has: {', '.join(names) or 'none'}", code="model-unknown"
            )
        self._model = names[0] if model is None else model
        self.info = Info(self._model, self.url, "", self._context_length())

    def _context_length(self) -> int | None:
        """What our own server says; None for others."""
        try:
            return int(self._tokenize([{"role": "user", "content": "x"}])["max_model_len"])
        except (GenerationError, KeyError, TypeError, ValueError):
            return None

    def _tokenize(self, messages: Sequence[Message]) -> dict[str, Any]:
        body = {"model": self._model, "messages": list(messages)}
        return self._call("POST", f"{self.url.removesuffix('/v1')}/tokenize", body)

    def _call(self, method: str, url: str, body: Any = None) -> dict[str, Any]:
        import httpx

        try:
            response = self._http.request(method, url, json=body)
            if response.is_error:
                raise _refused(response)
            fields = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise _no_server(url, error or type(error).__name__) from error
        if not isinstance(fields, dict):
            raise _no_server(url, f"found {type(fields).__name__}")
        return fields

    def answer(self, messages: Sequence[Message], params: Params, cancel: threading.Event) -> Iterator[Step]:
        """See `Backend`."""
        kept, dropped = list(messages), 0
        if self.info.context_length is not None:
            limit = prompt_limit(self.info.context_length, params)
            kept, dropped = fit(messages, lambda each: int(self._tokenize(each)["count"]), limit)
        start = time.perf_counter()
        first = last = None
        usage: dict[str, Any] = {}
        tokens, reason = 0, "length"
        for event in self._events(self._body(kept, params), cancel):
            usage = event.get("usage") or usage
            for choice in event.get("choices", []):
                text = choice.get("delta", {}).get("content") or ""
                reason = choice.get("finish_reason") or reason
                if text:
                    last = time.perf_counter()
                    first = last if first is None else first
                    tokens += 1
                    yield Step(text, tokens, dropped=dropped)
        if cancel.is_set():
            reason = "cancelled"
        end = time.perf_counter()
        counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", tokens))
        metrics = RequestMetrics.from_times(*counts, start=start, first=first, last=last, end=end)
        yield Step("", metrics.new_tokens, dropped=dropped, finish_reason=reason, metrics=metrics)

    def _body(self, messages: Sequence[Message], params: Params) -> dict[str, Any]:
        fields = {"max_tokens": params.max_new_tokens, **asdict(params)}
        body = {name: value for name, value in fields.items() if value is not None and name not in OTHER_FIELDS}
        if params.stop:
            body["stop"] = list(params.stop)
        if params.greedy:
            body["temperature"] = 0
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        return {**body, "model": self._model, "messages": messages, **streaming}

    def _events(self, body: dict[str, Any], cancel: threading.Event) -> Iterator[dict[str, Any]]:
        import httpx

        try:
            with self._http.stream("POST", f"{self.url}/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise _refused(response)
                for line in response.iter_lines():
                    # Leaving the block closes the connection, on which the server ends the answer.
                    if cancel.is_set() or line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise GenerationError(str(event["error"].get("message", event["error"])))
                        yield event
        except (httpx.HTTPError, ValueError) as error:
            raise GenerationError(
                f"the answer of {self.url} broke off: {error or type(error).__name__}; ask again",
                code="server-broke-off",
            ) from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def _no_server(url: str, reason: object) -> GenerationError:
    return GenerationError(
        f"{url} does not answer as an OpenAI-compatible server: {reason}", code="server-not-compatible"
    )


def _refused(response: Any) -> GenerationError:
    """The error for a response with an error status."""
    try:
        reason = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = " ".join(response.text.split())[:200]
    hint = "; give the key with --api-key" if response.status_code == 401 else ""
    return GenerationError(
        f"the server refused with status {response.status_code}: {reason}{hint}", code="server-refused"
    )
