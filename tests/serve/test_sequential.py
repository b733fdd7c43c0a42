"""A device that answers one request at a time: the NPU's path, emulated on CPU. No NPU was at hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support import serving

from ov_afm import Pipeline
from ov_afm.runtime.sampling import Params

ROOM = {"MAX_PROMPT_LEN": 128, "MIN_RESPONSE_LEN": 128}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[serving.Server]:
    room = [part for key, value in ROOM.items() for part in ("--ov-config", f"{key}={value}")]
    with serving.server(tiny_model, "--device", "NPU-EMULATED", "--max-queue", "6", *room) as running:
        yield running


@pytest.mark.slow
def test_answers_are_the_pipelines_and_the_emulation_is_named(server: serving.Server, tiny_model: Path) -> None:
    with Pipeline(tiny_model, "NPU-EMULATED", **ROOM) as pipeline:
        expected = pipeline.generate("Hello", Params(max_new_tokens=20, greedy=True)).text
    assert server.chat(max_tokens=20).json()["choices"][0]["message"]["content"] == expected
    assert any("on emulated NPU, context 256 tokens" in line for line in server.log)


def test_requests_are_answered_in_turn(server: serving.Server) -> None:
    alone = server.chat(max_tokens=60).json()["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(6) as pool:
        answers = [each.result() for each in [pool.submit(server.chat, max_tokens=60) for _ in range(6)]]
    assert [answer.status_code for answer in answers] == [200] * 6
    assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {alone}


@pytest.mark.slow
def test_full_queue_turns_requests_away(server: serving.Server) -> None:
    with ThreadPoolExecutor(20) as pool:
        sent = [pool.submit(server.chat, max_tokens=120, temperature=2, top_p=1, n=4) for _ in range(20)]
        statuses = [each.result().status_code for each in sent]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 7


def test_client_that_leaves_makes_room(server: serving.Server) -> None:
    for _ in range(10):
        body = {"messages": [{"role": "user", "content": "Go on"}], "max_tokens": 120, "stream": True, "n": 4}
        with server.connection("/v1/chat/completions", **body) as raw:
            assert raw.recv(15) == b"HTTP/1.1 200 OK"
    server.wait(lambda: server.metric("running_requests") == 0, 2, "the slot was not freed")
    assert server.chat().status_code == 200


def test_stop_string_ends_a_stream(server: serving.Server) -> None:
    free = server.chat(max_tokens=40).json()["choices"][0]["message"]["content"]
    stop = free[len(free) // 2 :][:3]
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**body, "stop": stop}) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: {")]
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == free[: free.index(stop)]
    assert choices[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("fields", "code", "named"),
    [
        ({"content": "word " * 30}, "context_length_exceeded", "up to 128"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
    ],
    ids=["long prompt", "logprobs"],
)
def test_what_the_npu_cannot_do_is_refused(
    server: serving.Server, fields: dict[str, object], code: str, named: str
) -> None:
    answer = server.chat(**fields)  # type: ignore[arg-type]
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == code
    assert named in error["message"]
    assert "emulated NPU" in error["message"]
    assert server.chat().status_code == 200


@pytest.mark.slow
def test_size_of_a_cache_that_is_not_there_is_refused(tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ov_afm", "serve", str(tiny_model), "--device", "NPU-EMULATED"]
        + ["--cache-size-gb", "1", "--port", "0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith("listening on ")] == [
        "ov-afm: error: cache_size_gb is for CPU and GPU; "
        "on NPU set --ov-config MAX_PROMPT_LEN=N and MIN_RESPONSE_LEN=N"
    ]
