"""A real server for tests: `ov-afm serve` in its own process, on a free port of this machine."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

START_S = 300
# A function that a model may call.
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Server:
    """A running server.

    Attributes:
        url: Its address, without `/v1`.
        log: What it has written to standard error, by line.
    """

    def __init__(self, *arguments: str | Path, port: int = 0, python: str | Path = sys.executable) -> None:
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [python, "-m", "ov_afm", "serve", "--port", str(port), *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.url = self._wait_for(r"(http://[\d.]+:\d+)/v1")
            self.http = httpx.Client(base_url=self.url, timeout=60)
            self.wait(lambda: self.http.get("/health").status_code == 200, START_S, "not ready")
        except BaseException:
            self.process.kill()
            raise

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))

    def _wait_for(self, pattern: str) -> str:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if match := re.search(pattern, "\n".join(self.log)):
                return match[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError("the server did not start:\n" + "\n".join(self.log))

    def engine(self) -> psutil.Process:
        """The engine's process."""
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def post(self, route: str, **body: Any) -> httpx.Response:
        """Send a JSON body."""
        return self.http.post(route, json=body)

    def chat(self, content: str = "Hello", **fields: Any) -> httpx.Response:
        """Send one user message."""
        fields = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0, **fields}
        return self.post("/v1/chat/completions", **fields)

    def connection(self, route: str, **body: Any) -> socket.socket:
        """A connection on which a request was sent and nothing was read; closing it is hanging up."""
        host, port = self.url.removeprefix("http://").split(":")
        data = json.dumps(body).encode()
        head = f"POST {route} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(data)}\r\n"
        raw = socket.create_connection((host, int(port)), timeout=30)
        raw.sendall(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + data)
        return raw

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"ov_afm_{name}(\{{|\s)", line))

    def wait(self, condition: Any, seconds: float = 30, why: str = "") -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{why or 'not'} within {seconds} s\n" + "\n".join(self.log)
            time.sleep(0.05)

    def terminate(self) -> int:
        """Send SIGTERM and wait for the end; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def server(*arguments: str | Path, port: int = 0, python: str | Path = sys.executable) -> Iterator[Server]:
    """A server that is gone afterwards."""
    running = Server(*arguments, port=port, python=python)
    try:
        yield running
    finally:
        running.http.close()
        if running.process.poll() is None:
            running.process.terminate()
            running.process.wait(60)
