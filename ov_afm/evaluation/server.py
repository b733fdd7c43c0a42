"""A model behind an OpenAI-compatible URL as something that answers tasks: ours or anyone's server."""

from __future__ import annotations

import os
from typing import Any

from ..errors import ConfigError, GenerationError
from ..system import resources
from .tasks import MAX_NEW_TOKENS

__all__ = ["Server"]

# A prompt may wait in the server's queue and then be computed for minutes.
TIMEOUT_S = 600.0


class Server:
    """A chat model on a server, which answers greedily.

    Args:
        url: Its address up to `/v1`. The key in `OPENAI_API_KEY` is sent along if it is set.

    Attributes:
        model: Name of the first model that it lists.

    Raises:
        ConfigError: The address is none, or the server lists no model.
        GenerationError: It does not answer.
    """

    def __init__(self, url: str) -> None:
        resources.require("eval", "httpx")
        self._url = url.rstrip("/")
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(
                f"--server takes an address such as http://127.0.0.1:8000/v1, found {url!r}", code="server-address"
            )
        models = self._call("GET", "/models").get("data", [])
        if not models:
            raise ConfigError(f"{self._url} lists no model", code="server-empty")
        self.model = str(models[0]["id"])

    def __call__(self, prompt: str) -> str:
        """The answer to one user message."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": MAX_NEW_TOKENS,
        }
        answer = self._call("POST", "/chat/completions", body)
        try:
            return str(answer["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise GenerationError(
                f"{self._url} answered without a message ({error!r})", code="server-answer"
            ) from error

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            response = httpx.request(
                method, self._url + path, json=body, headers=headers, timeout=TIMEOUT_S, follow_redirects=True
            )
            if response.is_error:
                raise GenerationError(
                    f"{self._url}{path} answered {response.status_code}: {response.text[:300]}", code="server-answer"
                )
            answer: dict[str, Any] = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise GenerationError(
                f"{self._url}{path} does not answer ({error}); start the server first, ours with: ov-afm serve DIR",
                code="server-silent",
            ) from error
        return answer
