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
from ..runtime.sampling import DEFAULT_MAX_NEW_TOKENS, Params
from .backend import ANSWER_SHARE, Info, Step, fit

__all__ = ["Remote"]

CONNECT_S = 10.0
# A long prompt may wait in the server's line and then be computed for minutes.
READ_S = 600.0
# Params that the server takes, by the name that they have on the wire.
WIRE = {
    "max_new_tokens": "max_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
}


class Remote:
    """A server.

    Args:
        url: Its address up to `/v1`.
        model: The model's name there; None takes the first.
        api_key: Key to show.

    Raises:
        ConfigError: The address is none, or the server has no such model.
        GenerationError: The server does not answer, or not as OpenAI's do.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        import httpx

        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url takes an address such as http://127.0.0.1:8000/v1, found {url!r}")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(headers=headers, timeout=httpx.Timeout(READ_S, connect=CONNECT_S))
        names = [str(each["id"]) for each in self._call("GET", f"{self.url}/models")["data"]]
        if not names or (model is not None and model not in names):
            raise ConfigError(f"{self.url} has no model {model or ''}; there are: {', '.join(names) or 'none'}")
        self.models = names
        self._model = model if model is not None else names[0]
        self.info = Info(self._model, self.url, "", self._context_length())

    def _context_length(self) -> int | None:
        """What our own server tells; None of others."""
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
            answer = self._http.request(method, url, json=body)
            if answer.is_error:
                raise GenerationError(_reason(answer.status_code, answer.text))
            found = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise GenerationError(
                f"{url} does not answer as an OpenAI-compatible server: {error or type(error).__name__}"
            ) from error
        if not isinstance(found, dict):
            raise GenerationError(f"{url} does not answer as an OpenAI-compatible server: found {type(found).__name__}")
        return found

    def answer(self, messages: Sequence[Message], params: Params, cancel: threading.Event) -> Iterator[Step]:
        """See `Backend`."""
        kept, dropped = list(messages), 0
        if self.info.context_length is not None:
            wanted = DEFAULT_MAX_NEW_TOKENS if params.max_new_tokens is None else params.max_new_tokens
            limit = self.info.context_length - min(wanted, self.info.context_length // ANSWER_SHARE)
            kept, dropped = fit(messages, lambda each: int(self._tokenize(each)["count"]), limit)
        fields = asdict(params)
        body: dict[str, Any] = {WIRE[name]: fields[name] for name in WIRE if fields[name] is not None}
        if params.stop:
            body["stop"] = list(params.stop)
        if params.greedy:
            body["temperature"] = 0
        body |= {"model": self._model, "messages": kept, "stream": True, "stream_options": {"include_usage": True}}
        begun = time.perf_counter()
        first = last = None
        usage: dict[str, Any] = {}
        tokens, reason = 0, "length"
        for event in self._events(body, cancel):
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
        metrics = RequestMetrics.from_times(
            int(usage.get("prompt_tokens", 0)),
            int(usage.get("completion_tokens", tokens)),
            start=begun,
            first=first,
            last=last,
            end=time.perf_counter(),
        )
        yield Step("", metrics.new_tokens, dropped=dropped, finish_reason=reason, metrics=metrics)

    def _events(self, body: dict[str, Any], cancel: threading.Event) -> Iterator[dict[str, Any]]:
        import httpx

        url = f"{self.url}/chat/completions"
        try:
            with self._http.stream("POST", url, json=body) as answer:
                if answer.is_error:
                    answer.read()
                    raise GenerationError(_reason(answer.status_code, answer.text))
                for line in answer.iter_lines():
                    # Leaving closes the connection, which the server hears.
                    if cancel.is_set() or line == "data: [DONE]":
                        return
                    if line.startswith("data: "):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise GenerationError(str(event["error"].get("message", event["error"])))
                        yield event
        except (httpx.HTTPError, ValueError) as error:
            raise GenerationError(f"{self.url} broke off: {error or type(error).__name__}; ask again") from error

    def close(self) -> None:
        """Close the connections."""
        self._http.close()


def _reason(status: int, text: str) -> str:
    """What a server says of an error."""
    try:
        said = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = " ".join(text.split())[:200]
    hint = "; give the key with --api-key" if status == 401 else ""
    return f"the server refused with status {status}: {said}{hint}"
