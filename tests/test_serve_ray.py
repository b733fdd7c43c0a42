"""Two Ray Serve replicas on this machine: both answer, one is killed under load, and it comes back."""

from __future__ import annotations

import os
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import serving


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def replicas(server: serving.Server) -> list[psutil.Process]:
    """The processes of this test's replicas: those that have an engine of ours as a child."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in family if "ServeReplica" in " ".join(process.cmdline())]


@pytest.mark.slow
def test_replicas_share_the_work_and_replace_each_other(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    arguments = ("--model", f"tiny={tiny_model}", "--cache-size-gb", "0.02", "--ray", "--replicas", "2")
    with serving.server(*arguments, "--ray-cpus", "0.5", port=free_port()) as server:
        server.wait(lambda: len(replicas(server)) == 2, 60, "no two replicas")
        assert Counter(statuses(server, 40)) == {200: 40}
        victim = replicas(server)[0]
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(statuses, server, 60)
            os.kill(victim.pid, 9)
            answered = Counter(under_way.result(60))
        assert set(answered) <= {200, 500, 503}
        assert answered[200] >= 30
        server.wait(
            lambda: len(alive := replicas(server)) == 2 and victim not in alive, 60, "the replica did not come back"
        )
        assert Counter(statuses(server, 20)) == {200: 20}
        assert server.terminate() == 0


def statuses(server: serving.Server, count: int) -> list[int]:
    def one(index: int) -> int:
        body = {"messages": [{"role": "user", "content": str(index)}], "max_tokens": 40, "temperature": 2}
        return client.post("/v1/chat/completions", json=body).status_code

    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, range(count)))


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1:4", (1, 4))])
def test_replicas_are_a_number_or_a_range(text: str, expected: tuple[int, int]) -> None:
    from ov_afm.serve.ray import replica_range

    assert replica_range(text) == expected


@pytest.mark.parametrize("text", ["0", "4:1", "two", "1:", ""])
def test_other_replicas_are_refused(text: str) -> None:
    from ov_afm.errors import ConfigError
    from ov_afm.serve.ray import replica_range

    with pytest.raises(ConfigError, match="replicas are a number or MIN:MAX, found"):
        replica_range(text)
