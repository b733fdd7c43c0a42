"""Runs in an environment of its own: an agent of openai-agents with a tool, whole and streamed, at the given URL."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any, Literal

from agents import Agent, ModelSettings, Runner, function_tool, set_tracing_disabled
from agents.models.openai_responses import OpenAIResponsesModel
from openai import AsyncOpenAI


async def run(url: str, *, streamed: bool) -> dict[str, Any]:
    asked: list[str] = []

    # After the first call it is not on offer, so that the model has to answer.
    @function_tool(is_enabled=lambda context, agent: not asked)
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """Weather."""
        asked.append(city)
        return "sunny"

    model = OpenAIResponsesModel("caller", AsyncOpenAI(base_url=url, api_key="none", max_retries=0))
    settings = ModelSettings(max_tokens=2000, extra_body={"seed": 3})
    agent = Agent("Clerk", instructions="Use the tool.", model=model, tools=[get_weather], model_settings=settings)
    events = []
    if streamed:
        result: Any = Runner.run_streamed(agent, "Weather in Paris?")
        events = [event.type async for event in result.stream_events()]
    else:
        result = await Runner.run(agent, "Weather in Paris?")
    kinds = [item.type for item in result.new_items]
    return {"asked": asked, "kinds": kinds, "answer": result.final_output, "events": sorted(set(events))}


if __name__ == "__main__":
    set_tracing_disabled(True)
    outcomes = {str(streamed): asyncio.run(run(sys.argv[1], streamed=streamed)) for streamed in (False, True)}
    json.dump(outcomes, sys.stdout)
