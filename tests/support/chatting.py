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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

START_S = 90
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = "Write a very long story about the sea."


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
        # Other children, which ask the drivers, answer one call and end.
        (engine,) = [each for each in children if "child_process._work(" in " ".join(each.cmdline())]
        return engine

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


class Tab:
    """A browser tab with the chat."""

    def __init__(self, window: Any, url: str) -> None:
        self.page = window.new_page()
        self.page.set_viewport_size({"width": 1280, "height": 900})
        self.errors: list[str] = []
        self.page.on("console", lambda each: self.errors.append(each.text) if each.type == "error" else None)
        self.page.on("pageerror", lambda each: self.errors.append(str(each)))
        self.page.goto(url)
        self.question = self.page.get_by_label("Your question").first
        self.questions = self.page.locator("#chat .user.message .content")
        self.answers = self.page.locator("#chat .bot.message")
        self.status = self.page.locator("#status .state")
        self.ready()

    def ready(self, text: str = "") -> None:
        """Wait until the engine is loaded."""
        from playwright.sync_api import expect

        expect(self.page.locator("#status .state.ready")).to_contain_text(text, timeout=90_000)

    def ask(self, text: str) -> None:
        """Type a question and send it."""
        self.question.fill(text)
        self.question.press("Enter")

    def begin_a_long_answer(self) -> None:
        """Ask for more than the test's time allows; returns when the answer has begun."""
        from playwright.sync_api import expect

        self.unfold("Sampling")
        longest = self.page.get_by_label("number input for Longest answer, tokens")
        longest.fill("4096")
        longest.press("Tab")
        before = self.answers.count()
        self.ask(LONG)
        expect(self.answers).to_have_count(before + 1)
        expect(self.answers.last).to_contain_text(re.compile(r"\w+ \w+ \w+ \w+"), timeout=60_000)

    def finished(self) -> str:
        """Wait for the end of the last answer; returns its text, figures included."""
        from playwright.sync_api import expect

        expect(self.answers.last).to_contain_text(re.compile(r" tokens ·|stopped"), timeout=60_000)
        return str(self.answers.last.inner_text())

    def press(self, name: str) -> None:
        """Press a button."""
        self.page.get_by_role("button", name=name, exact=True).first.click()

    def act(self, name: str) -> None:
        """Press a button below the last message that has it."""
        self.page.get_by_label(name).locator("visible=true").last.click()

    def unfold(self, name: str) -> None:
        """Open a part of the side column."""
        self.page.get_by_role("button", name=name).first.click()

    def choose(self, label: str, text: str) -> None:
        """Choose in a list."""
        self.page.get_by_label(label, exact=True).locator("visible=true").click()
        self.page.get_by_role("option", name=text).first.click()

    def reload(self) -> None:
        """Load the page again."""
        self.page.reload()
        self.ready()


Open = Callable[..., Tab]
