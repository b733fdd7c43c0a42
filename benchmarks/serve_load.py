"""The server under load: does /health answer, is memory flat, does every request end, whatever clients and engine do?

Each check has a server of its own and a bound; the exit status is 1 where a bound is missed.

- health: /health is asked from a process of its own while many clients stream and some hang up
- requests: memory and file descriptors of server and engine after the first fifth of many requests, and after the last;
  until then the KV cache is touched for the first time, and OpenVINO makes and keeps a kernel for every new shape
- hang-ups: clients that leave in the middle of a stream, one after the other
- kills: the engine is killed while clients stream; each request must end with an answer, an error event or a status

    python benchmarks/serve_load.py MODEL_DIR
    python benchmarks/serve_load.py MODEL_DIR --checks kills --kills 5
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import records
from program import check_counts, last_words, program
from records import Check

from ov_afm.errors import ConfigError, OVAFMError
from ov_afm.model_dir.model_directory import ModelDirectory
from ov_afm.system.console import markdown_table

START_S = 600.0
# What a request may take, restarts of the engine included.
REQUEST_S = 120.0
HEALTH_S = 0.2
FLAT = 0.03
# Clients of the checks that send many requests.
TOGETHER = 8

POLL = """
import http.client, json, sys, time
host, port = sys.argv[1].removeprefix("http://").split(":")
times = []
print("ready", flush=True)
while not sys.stdin.closed:
    begun = time.perf_counter()
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.request("GET", "/health")
    status = connection.getresponse().status
    connection.close()
    times.append((time.perf_counter() - begun, status))
    print(json.dumps(times[-1]), flush=True)
    time.sleep(0.02)
"""


class Server:
    """`ov-afm serve` in a process of its own.

    Attributes:
        url: Its address.
        process: Its process.
    """

    def __init__(self, options: argparse.Namespace, *arguments: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, "-m", "ov_afm", "serve", options.model, "--port", "0", "--host", "127.0.0.1"]
        command += ["--cache-size-gb", str(options.cache_size_gb), *arguments]
        self._child = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, text=True)
        self.process = psutil.Process(self._child.pid)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            log = self.log()
            if self._child.poll() is not None:
                raise OVAFMError(f"the server ended with status {self._child.returncode}: {last_words(log)}")
            if address := re.search(r"(http://[\d.]+:\d+)/v1", log):
                self.url = address[1]
                if self.healthy():
                    return
            time.sleep(0.1)
        self.close()
        raise OVAFMError(f"the server did not start within {START_S:.0f} s")

    def log(self) -> str:
        """What it has printed."""
        self._log.seek(0)
        return self._log.read()

    def healthy(self) -> bool:
        """Whether it takes requests."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=60).status_code == 200
        return False

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"ov_afm_{name}(\{{|\s)", line))

    def engine(self) -> psutil.Process | None:
        """The engine's process."""
        return next(iter(self.process.children()), None)

    def client(self) -> httpx.AsyncClient:
        """A client with as many connections as are asked for."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=TOGETHER)
        return httpx.AsyncClient(base_url=self.url, timeout=REQUEST_S, limits=limits)

    def close(self) -> None:
        """End it."""
        self._child.terminate()
        try:
            self._child.wait(60)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


@contextlib.contextmanager
def serving(options: argparse.Namespace, *arguments: str) -> Iterator[Server]:
    """A server that is gone afterwards."""
    server = Server(options, *arguments)
    try:
        yield server
    finally:
        server.close()


def body(new_tokens: int, *, stream: bool, seed: int = 0) -> dict[str, Any]:
    """A request that has exactly so many tokens."""
    messages = [{"role": "user", "content": f"{seed}: go on"}]
    sampling = {"temperature": 1, "top_p": 1, "seed": seed, "ignore_eos": True}
    return {"messages": messages, "max_tokens": new_tokens, "stream": stream, **sampling}


@contextlib.asynccontextmanager
async def begun(client: httpx.AsyncClient, new_tokens: int, seed: int = 0) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a stream, of which the first has come; leaving the block hangs up."""
    request = client.stream("POST", "/v1/chat/completions", json=body(new_tokens, stream=True, seed=seed))
    async with request as response:
        lines = response.aiter_lines()
        await anext(lines)
        yield lines


def health(options: argparse.Namespace) -> list[Check]:
    """Latency of /health beside streams and hang-ups."""
    with serving(options, "--max-running", str(options.streams)) as server:
        command = [sys.executable, "-c", POLL, server.url]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as poller:
            assert poller.stdout
            poller.stdout.readline()
            asyncio.run(_stream_and_hang_up(server, options))
            poller.terminate()
            answers = [json.loads(line) for line in poller.stdout if line.endswith("\n")]
    times = sorted(seconds for seconds, _ in answers)
    wrong = sum(status != 200 for _, status in answers)
    what = f"/health beside {options.streams} streams and {options.leavers} hang-ups"
    return [
        Check(f"{what}, most", times[-1], "s", HEALTH_S),
        Check(f"{what}, median of {len(times)}", times[len(times) // 2], "s"),
        Check("other answers than 200", wrong, "", 0),
    ]


async def _stream_and_hang_up(server: Server, options: argparse.Namespace) -> None:
    async with server.client() as client:

        async def read(seed: int) -> None:
            async with begun(client, options.new_tokens, seed) as lines:
                async for _ in lines:
                    pass

        async def leave(seed: int) -> None:
            async with begun(client, options.new_tokens, seed):
                pass

        readers = [asyncio.create_task(read(seed)) for seed in range(options.streams)]
        await asyncio.sleep(1)
        await asyncio.gather(*(leave(options.streams + seed) for seed in range(options.leavers)))
        await asyncio.gather(*readers)


def _held(server: Server) -> dict[str, float]:
    engine = server.engine()
    assert engine is not None
    return {
        f"{what} of the {name}": float(value)
        for name, process in (("server", server.process), ("engine", engine))
        for what, value in (("MB", process.memory_info().rss / 1e6), ("files", process.num_fds()))
    }


def requests(options: argparse.Namespace) -> list[Check]:
    """Memory and file descriptors over many requests."""
    with serving(options) as server:
        first = options.requests // 5
        statuses = asyncio.run(_many(server, range(first)))
        before = _held(server)
        begin = time.monotonic()
        statuses += asyncio.run(_many(server, range(first, options.requests)))
        seconds = time.monotonic() - begin
        after = _held(server)
    rate = (options.requests - first) / seconds
    checks = [Check(f"{options.requests} requests, without an answer", options.requests - statuses.total(), "", 0)]
    for name, value in after.items():
        if "files" in name:
            # A connection or two may just be closing.
            checks.append(
                Check(f"{name}, more at the end ({before[name]:.0f}, {value:.0f})", value - before[name], "", 2)
            )
        else:
            growth = value / before[name] - 1
            checks.append(Check(f"{name}, growth ({before[name]:.0f}, {value:.0f})", 100 * growth, "%", 100 * FLAT))
    answers = ", ".join(f"{count} of {status}" for status, count in sorted(statuses.items()))
    return [*checks, Check(f"requests a second; answers: {answers}", rate, "/s")]


async def _many(server: Server, numbers: range) -> collections.Counter[str]:
    """Send requests of several kinds, some of them wrong; how they ended."""
    statuses: collections.Counter[str] = collections.Counter()
    left = iter(numbers)
    async with server.client() as client:

        async def one(number: int) -> str:
            source = random.Random(number)
            kind, words = number % 8, source.randrange(4)
            if kind == 0:
                async with begun(client, 64, number):
                    return "hang-up"
            if kind == 1:
                wrong = {**body(1, stream=False, seed=number), "temperature": -1}
                return str((await client.post("/v1/chat/completions", json=wrong)).status_code)
            if kind == 2:
                return str((await client.post("/tokenize", json={"prompt": f"{number} " * 40})).status_code)
            request = body(1 + words, stream=kind > 4, seed=number)
            response = await client.post("/v1/chat/completions", json=request)
            return str(response.status_code)

        async def work() -> None:
            for number in left:
                with contextlib.suppress(httpx.HTTPError):
                    statuses[await one(number)] += 1

        await asyncio.gather(*(work() for _ in range(TOGETHER)))
    return statuses


def hang_ups(options: argparse.Namespace) -> list[Check]:
    """Clients that leave, one after the other."""
    with serving(options) as server:
        engine = server.engine()
        assert engine is not None

        async def leave() -> None:
            async with server.client() as client:
                for number in range(options.hang_ups):
                    async with begun(client, 1000, number):
                        pass

        asyncio.run(leave())
        begin = time.monotonic()
        while server.metric("running_requests") and time.monotonic() - begin < 30:
            time.sleep(0.02)
        freed_s = time.monotonic() - begin
        again = httpx.post(f"{server.url}/v1/chat/completions", json=body(4, stream=False), timeout=REQUEST_S)
        alive = server.engine()
        return [
            Check(f"{options.hang_ups} hang-ups in a row: last slot free after", freed_s, "s", 2),
            Check("engines lost", float(alive is None or alive.pid != engine.pid), "", 0),
            Check("requests refused afterwards", float(again.status_code != 200), "", 0),
        ]


def kills(options: argparse.Namespace) -> list[Check]:
    """The engine is killed again and again while clients ask."""
    with serving(options) as server:
        ends, longest_s = asyncio.run(_kill(server, options.kills, options.new_tokens))
    ended = ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))
    return [
        Check(f"{options.kills} kills: requests without answer or error ({ended})", ends["nothing"], "", 0),
        Check("longest time from a kill to the next answer", longest_s, "s", 60),
    ]


class _Asker:
    """Clients that ask again and again, and how their requests ended."""

    def __init__(self, client: httpx.AsyncClient, new_tokens: int) -> None:
        self.ends: collections.Counter[str] = collections.Counter()
        self._client, self._new_tokens = client, new_tokens
        self._numbers = itertools.count()
        self._answered, self._stop = asyncio.Event(), asyncio.Event()

    async def ask(self) -> None:
        """One client's requests, until the end."""
        while not self._stop.is_set():
            end = await self._one(next(self._numbers))
            self.ends[end] += 1
            if end == "answer":
                self._answered.set()
            else:
                await asyncio.sleep(0.1)

    async def next_answer(self) -> float:
        """Wait for a complete answer; returns the seconds."""
        begin = time.monotonic()
        self._answered.clear()
        await asyncio.wait_for(self._answered.wait(), START_S)
        return time.monotonic() - begin

    def stop(self) -> None:
        """Let every client end with its present request."""
        self._stop.set()

    async def _one(self, number: int) -> str:
        streams, last = number % 2 == 0, ""
        request = body(self._new_tokens, stream=streams, seed=number)
        try:
            async with self._client.stream("POST", "/v1/chat/completions", json=request) as response:
                async for line in response.aiter_lines():
                    last = line or last
        except httpx.HTTPError:
            return "nothing"
        failed = '"error"' in last
        if response.status_code != 200:
            return f"status {response.status_code}" if failed else "nothing"
        if streams and last != "data: [DONE]":
            return "error event" if failed else "nothing"
        return "answer"


async def _kill(server: Server, count: int, new_tokens: int) -> tuple[collections.Counter[str], float]:
    async with server.client() as client:
        asker = _Asker(client, new_tokens)
        clients = [asyncio.create_task(asker.ask()) for _ in range(TOGETHER)]
        waits = []
        for _ in range(count):
            waits.append(await asker.next_answer())
            await asyncio.sleep(random.random() / 2)
            if engine := server.engine():
                engine.kill()
        waits.append(await asker.next_answer())
        asker.stop()
        await asyncio.gather(*clients)
    return asker.ends, max(waits[1:])


CHECKS = {"health": health, "requests": requests, "hang-ups": hang_ups, "kills": kills}


@program
def main() -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model directory")
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--streams", type=int, default=64, help="clients that stream while /health is asked")
    parser.add_argument("--leavers", type=int, default=20, help="clients that hang up meanwhile")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--hang-ups", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=200, help="of streams beside /health and kills")
    parser.add_argument("--cache-size-gb", type=float, default=0.005, help="small: all of it is in use soon")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="write a record into a folder")
    options = parser.parse_args()
    least = {"streams": 1, "leavers": 0, "requests": 10, "hang_ups": 1, "kills": 1, "new_tokens": 2}
    check_counts(options, least)
    if options.cache_size_gb <= 0:
        raise ConfigError(f"--cache-size-gb must be above 0, found {options.cache_size_gb:g}")
    model = ModelDirectory.open(options.model)
    cpu = records.describe_cpu(psutil.cpu_count() or 1, None)
    checks = []
    for name in options.checks:
        print(f"{name} …", file=sys.stderr)
        checks += CHECKS[name](options)
    rows = [(check.what, check.text, check.limit, "" if check.holds else "**missed**") for check in checks]
    print(f"{model.name} on {cpu['name']}, {cpu['threads']} threads\n")
    print(markdown_table(("what", "figure", "bound", ""), rows, "lrrl"))
    if options.record is not None:
        print(records.save(records.new_record(model, cpu, [], checks=checks), options.record), file=sys.stderr)
    return int(not all(check.holds for check in checks))


if __name__ == "__main__":
    sys.exit(main())
