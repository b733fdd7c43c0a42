"""Clients of other projects against a real server."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import environments, serving
from support.exact import EXACT_OPTIONS

SUPPORT = Path(__file__).parents[1] / "support"
# litellm needs openai 2.x and the others need older packages than ours, so they have their own environment.
CLIENTS = ("litellm>=1.80", "openai>=2,<3", "together>=3")


@pytest.fixture(scope="module")
def url(tiny_model: Path, caller_model: Path) -> Iterator[str]:
    models = ("--model", f"tiny={tiny_model}", "--model", f"caller={caller_model}")
    with serving.server(*models, "--cache-size-gb", "0.05", *EXACT_OPTIONS) as running:
        yield f"{running.url}/v1"


@pytest.fixture(scope="module")
def outcomes(url: str) -> dict[str, Any]:
    python = environments.environment("interop", *CLIENTS)
    offline = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    result = environments.call(python, SUPPORT / "client_calls.py", url, env=offline)
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
@pytest.mark.network
def test_openais_node_client_speaks_responses(url: str) -> None:
    folder = environments.node_environment("openai", "openai@^7")
    with (SUPPORT / "responses_calls.mjs").open() as script:
        result = environments.call("node", "--input-type=module", "-", url, cwd=folder, stdin=script)
    assert result.returncode == 0, result.stderr[-2000:]
    outcome = json.loads(result.stdout)
    assert outcome["joined"] == outcome["whole"] == outcome["snapshot"] == outcome["final"]
    assert outcome["types"][0] == "response.created"
    assert outcome["types"][-1] in ("response.completed", "response.incomplete")
    assert outcome["next"] > 0
    assert outcome["refused"]["status"] == 400
    assert "web_search" in outcome["refused"]["message"]


@pytest.mark.slow
@pytest.mark.network
def test_an_agent_of_openai_agents_calls_its_tool_and_answers(url: str) -> None:
    python = environments.environment("agents", "openai-agents>=0.24,<0.25")
    result = environments.call(python, SUPPORT / "agents_calls.py", url)
    assert result.returncode == 0, result.stderr[-2000:]
    whole, streamed = (json.loads(result.stdout)[key] for key in ("False", "True"))
    assert whole["kinds"] == ["tool_call_item", "tool_call_output_item", "message_output_item"]
    assert whole["asked"][0] in ("Paris", "Rome")
    assert whole["answer"]
    assert "raw_response_event" in streamed.pop("events")
    assert {**streamed, "events": []} == whole


@pytest.mark.slow
def test_langchain(url: str) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="tiny", base_url=url, api_key="none", temperature=0, max_tokens=8)
    whole = chat.invoke("Hello").content
    assert "".join(chunk.content for chunk in chat.stream("Hello")) == whole
