"""A model behind an OpenAI-compatible URL as something that answers tasks: ours or anyone's server."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any

from ..errors import ConfigError, GenerationError
from .tasks import MAX_NEW_TOKENS

__all__ = ["Server"]

# A prompt may wait in the server's line and then be computed for minutes.
TIMEOUT_S = 600.0


class Server:
    """A chat model on a server, asked greedily.

    Args:
        url: Its address up to `/v1`. `OPENAI_API_KEY` is shown to it if set.

    Attributes:
        model: Name of the first model that it lists.

    Raises:
        ConfigError: The address is none, or the server lists no model.
        GenerationError: It does not answer.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(f"--server takes an address such as http://127.0.0.1:8000/v1, found {url!r}")
        models = self._call("/models", None).get("data", [])
        if not models:
            raise ConfigError(f"{self._url} lists no model")
        self.model = str(models[0]["id"])

    def __call__(self, prompt: str) -> str:
        """The answer to one user message."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": MAX_NEW_TOKENS,
        }
        found = self._call("/chat/completions", body)
        try:
            return str(found["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise GenerationError(f"{self._url} answered without a message ({error!r})") from error

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                found: dict[str, Any] = json.load(response)
                return found
        except urllib.error.HTTPError as error:
            raise GenerationError(
                f"{self._url}{path} answered {error.code}: {error.read(300).decode('utf-8', 'replace')}"
            ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise GenerationError(
                f"{self._url}{path} does not answer ({reason}); start the server first, ours with: ov-afm serve DIR"
            ) from error
