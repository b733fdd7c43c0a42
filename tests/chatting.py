"""A real browser chat for tests: `ov-afm chat --ui` in a process of its own, and Chromium before it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

START_S = 90
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Chat:
    """A running page.

    Attributes:
        url: Its address.
        log: What it has written to standard error, by line.
    """

    def __init__(self, *arguments: str | Path, data: Path) -> None:
        self.log: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ov_afm", "chat", "--ui", "--no-browser", "--port", "0", *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env={**os.environ, "OV_AFM_DATA": str(data)},
        )
        threading.Thread(target=self._read, daemon=True).start()
        deadline = time.monotonic() + START_S
        while not (match := re.search(r"chat on (http://\S+)", "\n".join(self.log))):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError("the chat did not start:\n" + "\n".join(self.log))
            time.sleep(0.05)
        self.url = match[1]

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))

    def engine(self) -> psutil.Process:
        """The engine's process."""
        children = psutil.Process(self.process.pid).children()
        (found,) = [each for each in children if "ov_afm.chat.worker" in each.cmdline()]
        return found

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def chat(*arguments: str | Path, data: Path) -> Iterator[Chat]:
    """A page that is gone afterwards."""
    running = Chat(*arguments, data=data)
    try:
        yield running
    finally:
        running.close()


@contextmanager
def server_that_says(text: str, pause_s: float = 0.0) -> Iterator[str]:
    """An OpenAI-compatible server with one model that always says the same, word by word; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"object": "list", "data": [{"id": "parrot"}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path != "/v1/chat/completions":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            with contextlib.suppress(OSError):
                for word in re.findall(r"\s*\S+", text):
                    self._event({"choices": [{"index": 0, "delta": {"content": word}}]})
                    time.sleep(pause_s)
                self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
                self._event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5}})
                self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, fields: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(fields).encode() + b"\n\n")
            self.wfile.flush()

        def _send(self, fields: dict[str, Any]) -> None:
            body = json.dumps(fields).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()
