"""Two Ray Serve replicas on this machine: both answer, one is killed under load, and it comes back."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from support import serving

from ov_afm.errors import ConfigError
from ov_afm.serve.ray.deploy import replica_range
from ov_afm.serve.ray.router import conversation_of, keeper_of, replica_tag

LONG = {"max_tokens": 2000, "ignore_eos": True, "temperature": 2}


def free_port() -> int:
    """A port below those that systems give out by themselves: Ray's own sockets could take one of them meanwhile."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="module")
def cluster(tiny_model: Path) -> Iterator[serving.Server]:
    """Two replicas that take two requests each and let one wait."""
    arguments = ("--model", f"tiny={tiny_model}", "--cache-size-gb", "0.02", "--max-running", "2", "--max-queue", "1")
    arguments += ("--alias", "claude-*=tiny")
    with serving.server(*arguments, "--ray", "--replicas", "2", "--ray-cpus", "0.5", port=free_port()) as running:
        yield running
        assert running.terminate() == 0


def replicas(server: serving.Server) -> list[psutil.Process]:
    processes = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        # It may end between the two calls.
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ServeReplica:ov_afm:Replica" in " ".join(process.cmdline()):
                processes.append(process)
    return processes


@pytest.fixture
def server(cluster: serving.Server) -> serving.Server:
    """The cluster when both replicas answer conversations that neither knows."""

    def answering() -> set[str | None]:
        return {ask(cluster, str(uuid.uuid4())).headers.get("x-replica") for _ in range(8)} - {None}

    cluster.wait(lambda: len(answering()) == 2, 120, "one replica does not answer")
    return cluster


def ask(server: serving.Server, question: str, **fields: object) -> httpx.Response:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": 8, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)


def together(call: Callable[[int], httpx.Response], count: int, at_once: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(call, range(count)))


def victim(server: serving.Server) -> tuple[Callable[[], None], Callable[[], bool]]:
    """A replica to be killed: what kills it at once, and what says whether it was replaced."""
    one = replicas(server)[0]
    return one.kill, lambda: len(alive := replicas(server)) == 2 and one not in alive


@pytest.mark.slow
def test_a_conversation_stays_with_its_replica_and_others_spread(server: serving.Server) -> None:
    def stayed() -> bool:
        first = {question: ask(server, question) for question in (str(uuid.uuid4()) for _ in range(12))}
        # Ray tells its routers a moment later who has what.
        time.sleep(next(pauses))
        homes = {answer.headers["x-replica"] for answer in first.values()}
        return len(homes) == 2 and all(goes_home(question, answer) for question, answer in first.items())

    def goes_home(question: str, answer: httpx.Response) -> bool:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": question},
            answer.json()["choices"][0]["message"],
            {"role": "user", "content": "Go on"},
        ]
        body = {"messages": messages, "max_tokens": 4}
        later = [httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300) for _ in range(3)]
        return all(each.headers["x-replica"] == answer.headers["x-replica"] for each in later)

    # By chance 36 requests find the right one of two once in 7e10 times.
    pauses = iter((3, 6, 12, 24))
    server.wait(stayed, 120, "conversations leave their replica")


@pytest.mark.slow
def test_no_request_is_lost_with_its_replica_before_the_first_token(server: serving.Server) -> None:
    kill, replaced = victim(server)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(together, lambda index: ask(server, str(index), max_tokens=100), 40, 2)
        server.wait(lambda: under_way.running(), 10)
        kill()
        statuses = Counter(answer.status_code for answer in under_way.result(300))
    assert statuses == {200: 40}
    server.wait(replaced, 180, "the replica did not come back")


@pytest.mark.slow
def test_a_stream_that_had_begun_ends_with_an_error_event_when_its_replica_dies(server: serving.Server) -> None:
    def streamed(index: int) -> list[str]:
        body = {"messages": [{"role": "user", "content": str(index)}], "stream": True, **LONG}
        lines = []
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=300) as response:
            for line in response.iter_lines():
                lines += [line] if line else []
                if len(lines) == 3:
                    begun.add(index)
        return lines

    begun: set[int] = set()
    kill, replaced = victim(server)
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(streamed, index) for index in range(4)]
        # Each replica runs two; if three were sent to one, the third waits.
        server.wait(lambda: len(begun) >= 3, 30, "the streams did not begin")
        with_an_answer = sorted(begun)
        kill()
        ends = [streams[index].result(300)[-1] for index in with_an_answer]
    broken = [json.loads(end.removeprefix("data: ")) for end in ends if end != "data: [DONE]"]
    assert 0 < len(broken) < len(ends)
    for end in broken:
        assert end["error"]["code"] == "engine_unavailable"
        assert end["error"]["message"] == "the replica that answered is gone; ask again"
    server.wait(replaced, 180, "the replica did not come back")


@pytest.mark.slow
def test_more_than_all_queues_hold_is_refused_with_a_time_to_retry(server: serving.Server) -> None:
    answers = together(lambda index: ask(server, str(index), **LONG), 24, 24)
    assert set(Counter(answer.status_code for answer in answers)) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "2"
    assert refused.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.slow
def test_hanging_up_frees_the_slots_of_a_replica(server: serving.Server) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True, **LONG}
    for _ in range(12):
        server.connection("/v1/chat/completions", **body).close()
    # Four slots and two places in line: had they been kept, these would wait or be refused.
    server.wait(lambda: {answer.status_code for answer in together(lambda i: ask(server, str(i)), 4, 4)} == {200}, 30)


@pytest.mark.slow
def test_a_response_is_continued_by_the_replica_that_keeps_it_and_lost_with_it(server: serving.Server) -> None:
    def respond(**fields: object) -> httpx.Response:
        return httpx.post(f"{server.url}/v1/responses", json={"max_output_tokens": 4, **fields}, timeout=300)

    def continued(first: httpx.Response) -> bool:
        later = respond(input="Go on", previous_response_id=first.json()["id"])
        return bool(later.status_code == 200 and later.headers["x-replica"] == first.headers["x-replica"])

    firsts = [respond(input=str(index)) for index in range(12)]
    assert len({first.headers["x-replica"] for first in firsts}) == 2
    assert all(continued(first) for first in firsts)
    kept = firsts[0].json()
    assert httpx.get(f"{server.url}/v1/responses/{kept['id']}").json() == kept
    kill, replaced = victim(server)
    kill()
    server.wait(replaced, 180, "the replica did not come back")
    answers = [respond(input="Go on", previous_response_id=first.json()["id"]) for first in firsts]
    lost = [answer.json()["error"]["code"] for answer in answers if answer.status_code != 200]
    assert 0 < len(lost) < len(firsts)
    assert set(lost) == {"previous_response_not_found"}


@pytest.mark.slow
def test_the_rest_of_the_interface_is_that_of_one_machine(server: serving.Server) -> None:
    assert [model["id"] for model in server.http.get("/v1/models").json()["data"]] == ["tiny"]
    assert server.http.get("/nowhere").json()["error"]["code"] == "not_found"
    assert server.http.post("/v1/chat/completions", content=b"{").json()["error"]["code"] == "unsupported_media_type"
    long = server.http.post("/tokenize", json={"prompt": "x" * (9 << 20)})
    assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.slow
def test_the_other_apis_and_names_reach_the_replicas(server: serving.Server) -> None:
    fields = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    answer = httpx.post(f"{server.url}/v1/messages", json={**fields, "model": "claude-x", "max_tokens": 4}, timeout=60)
    assert "event: message_stop" in answer.text
    answer = httpx.post(f"{server.url}/api/chat", json={**fields, "model": "tiny:latest"}, timeout=60)
    assert json.loads(answer.text.splitlines()[-1])["done"]
    answer = httpx.post(f"{server.url}/v1/messages", json={**fields, "model": "none", "max_tokens": 4}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_a_conversation_is_known_by_its_beginning() -> None:
    def key(*contents: str, **more: str) -> str:
        roles = ("system", "user", "assistant", "user")
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        return conversation_of(json.dumps({"messages": messages, **more}).encode()).key

    assert key("s", "a") == key("s", "a", "b", "c") != ""
    assert len({key("s", "a"), key("s", "b"), key("t", "a"), key("s", "a", model="other")}) == 4


def test_only_a_conversation_that_continues_and_a_long_prompt_may_be_cached() -> None:
    def cached(**fields: object) -> bool:
        return conversation_of(json.dumps(fields).encode()).cached

    asked = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert not cached(messages=asked)
    assert cached(messages=[*asked, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}])
    assert not cached(prompt="a short one")
    assert cached(prompt="a document " * 1000)
    assert not cached(input="a")
    assert cached(input=[*asked, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}])


def test_the_id_of_a_response_names_the_replica_that_keeps_it() -> None:
    tag = replica_tag("a replica")
    name = f"resp_{tag}{'0' * 48}"
    assert keeper_of(f"/v1/responses/{name}/input_items", b"") == tag
    for path in ("/v1/responses", "/v1/responses/input_tokens"):
        assert keeper_of(path, json.dumps({"previous_response_id": name}).encode()) == tag
    for body in (b"{", b"[]", b'{"previous_response_id": 1}', b'{"previous_response_id": "resp_1"}'):
        assert keeper_of("/v1/responses", body) == ""
    assert keeper_of("/v1/chat/completions", json.dumps({"previous_response_id": name}).encode()) == ""


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"messages": 3}', b'{"messages": [3]}', b"\xff", b"null"])
def test_what_is_no_conversation_has_no_key(body: bytes) -> None:
    assert conversation_of(body) == ("", False)


@pytest.mark.parametrize(("text", "expected"), [("2", (2, 2)), ("1:4", (1, 4))])
def test_replicas_are_a_number_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert replica_range(text) == expected


@pytest.mark.parametrize("text", ["0", "4:1", "two", "1:", ""])
def test_other_replicas_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="replicas are a number or MIN:MAX, found") as caught:
        replica_range(text)
    assert caught.value.code == "replica-range"


@pytest.mark.slow
def test_after_sigterm_a_stream_ends_as_it_should_and_new_requests_hear_to_ask_again(cluster: serving.Server) -> None:
    """The last test of these replicas."""
    body = {"messages": [{"role": "user", "content": "Go on"}], "stream": True, **LONG}
    later: list[httpx.Response] = []
    with httpx.stream("POST", f"{cluster.url}/v1/chat/completions", json=body, timeout=300) as response:
        lines = response.iter_lines()
        next(lines)
        cluster.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(httpx.TransportError):
            while len(later) < 200:
                later.append(httpx.get(f"{cluster.url}/v1/models", timeout=10))
                time.sleep(0.02)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    with contextlib.suppress(httpx.TransportError):
        while True:
            later.append(httpx.get(f"{cluster.url}/v1/models", timeout=10))
    refused = [answer for answer in later if answer.status_code != 200]
    assert Counter(answer.status_code for answer in refused) == {503: len(refused)}
    assert refused
    assert refused[0].headers["retry-after"] == "2"
    assert refused[0].json()["error"]["code"] == "engine_unavailable"
    assert cluster.process.wait(60) == 0


def started_here(model: Path, *arguments: str) -> subprocess.Popen[str]:
    command = (sys.executable, "-m", "ov_afm", "serve", str(model), "--ray", "--port", str(free_port()), *arguments)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_device_that_no_replica_has_ends_with_a_one_line_error(tiny_model: Path) -> None:
    process = started_here(tiny_model, "--device", "GPU")
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("ov-afm: error: device 'GPU' is not here; available: CPU")


@pytest.mark.slow
def test_a_resource_that_no_node_has_is_waited_for_until_ctrl_c(tiny_model: Path) -> None:
    process = started_here(tiny_model, "--ray-resource", "NPU=1")
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if "more than 30s to be scheduled" in line:
            break
    assert '{"NPU": 1.0, "CPU": 1}' in said[-1], said
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0, rest
    assert time.monotonic() - begun < 20


@pytest.mark.slow
def test_a_cluster_that_does_not_answer_ends_with_a_one_line_error(tiny_model: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    process = started_here(tiny_model, "--ray-address", address)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith(f"ov-afm: error: no Ray cluster at {address}: ")
