"""Other people's clients against a real server; those that are not installed are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import serving


@pytest.fixture(scope="module")
def url(tiny_model: Path) -> Iterator[str]:
    with serving.server("--model", f"tiny={tiny_model}", "--cache-size-gb", "0.02") as running:
        yield f"{running.url}/v1"


MESSAGES = [{"role": "user", "content": "Hello"}]


def test_together(url: str) -> None:
    together = pytest.importorskip("together")
    # Its paths begin with /v1.
    client = together.Together(api_key="none", base_url=url.removesuffix("/v1"))
    asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = client.chat.completions.create(**asked, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content


def test_litellm(url: str) -> None:
    litellm = pytest.importorskip("litellm")
    asked = {"model": "openai/tiny", "api_base": url, "api_key": "none", "messages": MESSAGES, "temperature": 0}
    whole = litellm.completion(**asked, max_tokens=8)
    chunks = list(litellm.completion(**asked, max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 8


def test_langchain(url: str) -> None:
    langchain = pytest.importorskip("langchain_openai")
    chat = langchain.ChatOpenAI(model="tiny", base_url=url, api_key="none", temperature=0, max_tokens=8)
    whole = chat.invoke("Hello").content
    assert "".join(chunk.content for chunk in chat.stream("Hello")) == whole
