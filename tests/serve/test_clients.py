"""Clients of other projects against a real server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import environments, serving

# litellm needs openai 2.x and the others need older packages than ours, so they have their own environment.
CLIENTS = ("litellm>=1.80", "openai>=2,<3", "together>=3")


@pytest.fixture(scope="module")
def url(tiny_model: Path) -> Iterator[str]:
    with serving.server("--model", f"tiny={tiny_model}", "--cache-size-gb", "0.02") as running:
        yield f"{running.url}/v1"


@pytest.fixture(scope="module")
def outcomes(url: str) -> dict[str, Any]:
    python = environments.environment("interop", *CLIENTS)
    offline = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    result = environments.call(python, Path(__file__).parents[1] / "support" / "client_calls.py", url, env=offline)
    assert result.returncode == 0, result.stderr[-2000:]
    return dict(json.loads(result.stdout))


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("client", ["openai_2", "together", "litellm"])
def test_a_client_gets_the_same_answer_whole_and_streamed(outcomes: dict[str, Any], client: str) -> None:
    outcome = outcomes[client]
    assert outcome["joined"] == outcome["whole"]
    assert 0 < outcome["tokens"] <= 8


@pytest.mark.slow
def test_langchain(url: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="tiny", base_url=url, api_key="none", temperature=0, max_tokens=8)
    whole = chat.invoke("Hello").content
    assert "".join(chunk.content for chunk in chat.stream("Hello")) == whole
