"""Runs in an environment of its own: calls the server at the given URL with other clients, and prints their answers."""

from __future__ import annotations

import json
import sys
from typing import Any

MESSAGES = [{"role": "user", "content": "Hello"}]
REQUEST = {"messages": MESSAGES, "max_tokens": 8, "temperature": 0}


def outcome(whole: Any, chunks: Any) -> dict[str, Any]:
    return {
        "whole": whole.choices[0].message.content,
        "joined": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "tokens": whole.usage.completion_tokens,
    }


def openai_2(url: str) -> dict[str, Any]:
    import openai

    assert openai.__version__.startswith("2."), openai.__version__
    client = openai.OpenAI(base_url=url, api_key="none")
    create = client.chat.completions.create
    return outcome(create(model="tiny", **REQUEST), create(model="tiny", **REQUEST, stream=True))


def together(url: str) -> dict[str, Any]:
    from together import Together

    # Its paths begin with /v1.
    create = Together(api_key="none", base_url=url.removesuffix("/v1")).chat.completions.create
    return outcome(create(model="tiny", **REQUEST), create(model="tiny", **REQUEST, stream=True))


def litellm(url: str) -> dict[str, Any]:
    from litellm import completion

    request = {"model": "openai/tiny", "api_base": url, "api_key": "none", **REQUEST}
    return outcome(completion(**request), completion(**request, stream=True))


if __name__ == "__main__":
    json.dump({call.__name__: call(sys.argv[1]) for call in (openai_2, together, litellm)}, sys.stdout)
