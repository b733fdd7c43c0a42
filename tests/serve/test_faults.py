"""What may go wrong while serving: clients that disconnect, too many at once, a dead engine, a full cache, the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from support import serving

LONG = 1500


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[serving.Server]:
    arguments = ("--cache-size-gb", "0.02", "--max-running", "32", "--max-queue", "40", "--request-timeout", "60")
    with serving.server(tiny_model, *arguments) as running:
        yield running


def long_stream() -> dict[str, Any]:
    """A request that would run for seconds."""
    messages = [{"role": "user", "content": "Go on"}]
    sampling = {"temperature": 2, "top_p": 1, "ignore_eos": True}
    return {"messages": messages, "max_tokens": LONG, "stream": True, **sampling}


def running(server: serving.Server) -> bool:
    return server.metric("running_requests") > 0


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_hang_up_frees_the_slot_within_two_seconds(server: serving.Server, stream: bool) -> None:
    body = {**long_stream(), "stream": stream, "n": 8}
    raw = server.connection("/v1/chat/completions", **body)
    server.wait(lambda: running(server), why="not running")
    left = time.monotonic()
    raw.close()
    server.wait(lambda: not running(server), 2, "the slot was not freed")
    assert time.monotonic() - left < 2
    assert server.chat().status_code == 200


@pytest.mark.slow
def test_two_hundred_hang_ups_leave_a_working_server(server: serving.Server) -> None:
    pid = server.engine().pid
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: _hang_up(server), range(200)))
    server.wait(lambda: not running(server), 2, "slots were not freed")
    assert server.chat().status_code == 200
    assert server.engine().pid == pid


def _hang_up(server: serving.Server) -> None:
    with server.connection("/v1/chat/completions", **long_stream()) as raw:
        assert raw.recv(15) == b"HTTP/1.1 200 OK"


def test_thirty_two_streams_finish_and_health_answers_meanwhile(server: serving.Server) -> None:
    # Each answer fits into the buffer of its socket.
    body = {**long_stream(), "max_tokens": 300}
    streams = [server.connection("/v1/chat/completions", **body, seed=seed) for seed in range(32)]
    server.wait(lambda: running(server), why="not running")
    slowest = 0.0
    while running(server):
        begin = time.monotonic()
        assert server.http.get("/health").status_code == 200
        slowest = max(slowest, time.monotonic() - begin)
        time.sleep(0.05)
    assert 0 < slowest < 1
    for raw in streams:
        with raw:
            said = b"".join(iter(lambda raw=raw: raw.recv(1 << 16), b""))
            assert said.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), said[-200:]


def test_a_full_queue_refuses_requests(server: serving.Server) -> None:
    body = {**long_stream(), "stream": False}
    connections = [server.connection("/v1/chat/completions", **body) for _ in range(72)]
    server.wait(lambda: server.metric("queued_requests") == 40, why="the queue is not full")
    refused = server.chat()
    for raw in connections[:-1]:
        raw.close()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "2"
    assert refused.json()["error"]["code"] == "queue_full"
    with connections[-1] as waited:
        assert waited.recv(15) == b"HTTP/1.1 200 OK"


def test_dead_engine_ends_streams_with_an_error_and_comes_back(server: serving.Server) -> None:
    restarts = server.metric("engine_restarts")
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=long_stream(), timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    os.kill(server.engine().pid, signal.SIGKILL)
    server.wait(lambda: server.http.get("/health").status_code == 503, 5, "the server still claims to be ready")
    reader.join(10)
    assert not reader.is_alive()
    last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_unavailable"
    refused = server.chat()
    assert refused.status_code == 503
    assert "retry-after" in refused.headers
    server.wait(lambda: server.http.get("/health").status_code == 200, 60, "the engine did not come back")
    assert server.chat().status_code == 200
    assert server.metric("engine_restarts") == restarts + 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP")
def test_stuck_engine_ends_streams_with_an_error_and_is_started_again(server: serving.Server) -> None:
    engine, restarts = server.engine(), server.metric("engine_restarts")
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=long_stream(), timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        engine.suspend()
        server.wait(lambda: server.http.get("/health").status_code == 503, 10, "the server still claims to be ready")
        last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_unavailable"
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    server.wait(lambda: server.http.get("/health").status_code == 200, 60, "the engine did not come back")
    assert server.chat().status_code == 200
    assert server.metric("engine_restarts") == restarts + 1
    assert any("the engine was ended because it was stopped" in line for line in server.log)


@pytest.mark.slow
def test_clients_that_never_read_do_not_fill_the_server(tiny_model: Path) -> None:
    limits = ("--cache-size-gb", "0.02", "--max-running", "2", "--request-timeout", "3")
    with serving.server(tiny_model, *limits) as full:
        body = {**long_stream(), "max_tokens": 2000, "n": 16}
        silent = [full.connection("/v1/chat/completions", **body) for _ in range(4)]
        full.wait(lambda: full.metric("running_requests") == 2, 10, "not running")
        full.wait(lambda: not running(full), 8, "a client that does not read kept its slot")
        assert full.chat().status_code == 200
        for raw in silent:
            raw.close()


@pytest.mark.slow
def test_a_cache_too_small_for_all_makes_them_wait(tiny_model: Path) -> None:
    # Room for about 700 tokens; ten answers of 300 do not fit at once.
    with serving.server(tiny_model, "--cache-size-gb", "0.0001") as small:
        limit = small.http.get("/v1/models").json()["data"][0]["max_model_len"]
        assert limit < 1500
        tokens = limit // 2
        with ThreadPoolExecutor(10) as pool:
            answers = list(
                pool.map(lambda seed: small.chat(max_tokens=tokens, temperature=2, top_p=1, seed=seed), range(10))
            )
        assert [answer.status_code for answer in answers] == [200] * 10
        assert max(answer.json()["usage"]["completion_tokens"] for answer in answers) == tokens
        # Prompts in the prefix cache, which exceed it together.
        for _ in range(3):
            with ThreadPoolExecutor(3) as pool:
                prompts = [[100 + number] * (limit * 6 // 10) for number in range(3)]
                cached = list(pool.map(lambda prompt: small.post("/v1/completions", prompt=prompt), prompts))
            assert [answer.status_code for answer in cached] == [200] * 3
        refused = small.post("/v1/completions", prompt=[100] * (limit + 1))
        assert refused.status_code == 400
        assert f"the KV cache holds {limit}, more with a larger --cache-size-gb" in refused.json()["error"]["message"]


@pytest.mark.slow
def test_time_limit_ends_a_request(tiny_model: Path) -> None:
    with serving.server(tiny_model, "--cache-size-gb", "0.02", "--request-timeout", "0.3") as quick:
        answer = quick.chat(max_tokens=2400, temperature=2, top_p=1, n=16)
        assert answer.status_code == 504
        assert answer.json()["error"]["code"] == "timeout"
        quick.wait(lambda: not running(quick), 2, "the slot was not freed")


@pytest.mark.slow
def test_every_route_but_health_needs_a_key(tiny_model: Path) -> None:
    with serving.server(tiny_model, "--cache-size-gb", "0.02", "--api-key", "s3cret", "--api-key", "zweiter") as locked:
        assert locked.http.get("/health").status_code == 200
        for route in ("/v1/models", "/metrics", "/version", "/docs", "/openapi.json", "/nothing"):
            assert locked.http.get(route).status_code == 401, route
        answer = locked.chat()
        assert answer.status_code == 401
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert "s3cret" not in answer.text
        for shown, status in (("Bearer s3cret", 200), ("Bearer zweiter", 200), ("Bearer s3cre", 401), ("s3cret", 401)):
            assert locked.http.get("/v1/models", headers={"authorization": shown}).status_code == status
        preflight = locked.http.options(
            "/v1/models", headers={"origin": "http://evil", "authorization": "Bearer s3cret"}
        )
        assert "access-control-allow-origin" not in preflight.headers


@pytest.mark.slow
def test_sigterm_lets_a_running_stream_finish_and_leaves_nothing_behind(tiny_model: Path) -> None:
    with serving.server(tiny_model, "--cache-size-gb", "0.02") as ending:
        engine = ending.engine()
        body = {**long_stream(), "max_tokens": 600, "n": 8}
        with httpx.stream("POST", f"{ending.url}/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            ending.process.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.HTTPError):
                for _ in range(50):
                    httpx.get(f"{ending.url}/version", timeout=2)
                    time.sleep(0.05)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert ending.process.wait(30) == 0
        assert not psutil.pid_exists(engine.pid) or engine.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_engine_ends_with_a_server_that_was_killed(tiny_model: Path) -> None:
    with serving.server(tiny_model, "--cache-size-gb", "0.02") as killed:
        engine = killed.engine()
        killed.process.kill()
        killed.process.wait()
        engine.wait(10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which model? give a model directory, or --model NAME=DIR"),
        (["--model", "x"], "--model takes KEY=VALUE, found 'x'"),
        (["/nowhere"], "no such model directory: /nowhere"),
        (
            ["--model", "a b=/nowhere"],
            "a model's name is letters, digits and . _ : / -, found 'a b'; use --model NAME=DIR",
        ),
    ],
    ids=["none", "no name", "missing", "bad name"],
)
def test_a_wrong_start_ends_with_a_one_line_error(arguments: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ov_afm", "serve", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (1, f"ov-afm: error: {message}\n")


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_ends_the_server_with_a_one_line_error(tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ov_afm", "serve", str(tiny_model), "--port", "0", "--cache-size-gb", "0.0000001"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    # The engine loads while the port is opened, so either may be reported first.
    lines = [line for line in done.stderr.splitlines() if not line.startswith("listening on ")]
    assert len(lines) == 1
    assert lines[0].startswith("ov-afm: error: a KV cache of 1e-07 GB holds no text;")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory maps")
def test_http_process_loads_no_engine(server: serving.Server) -> None:
    def libraries(process: psutil.Process) -> set[str]:
        return {
            Path(each.path).name for each in process.memory_maps() if "openvino" in each.path or "torch" in each.path
        }

    assert libraries(server.engine())
    assert not libraries(psutil.Process(server.process.pid))
