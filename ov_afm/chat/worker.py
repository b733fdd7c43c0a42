"""The engine's process: loads one model, answers one conversation after the other.

Native code may die here without the browser's page: the page's process holds no model. Requests come
as JSON lines on standard input, what happens goes back as JSON lines on standard output. The process
ends when the other end of the pipe closes.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from ..errors import OVAFMError
from ..pipeline import Pipeline, Use
from ..runtime.sampling import Params
from ..system.telemetry import silence
from .backend import Local

__all__ = ["main"]

Message = dict[str, Any]


class Worker:
    """Answers requests in the order in which they come.

    Args:
        channel: Where to write what happens.
    """

    def __init__(self, channel: IO[str]) -> None:
        self._channel, self._lock = channel, threading.Lock()
        self._requests: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._cancels: dict[int, threading.Event] = {}

    def send(self, **message: Any) -> None:
        """Write a line; with nobody to read it, end."""
        try:
            with self._lock:
                self._channel.write(json.dumps(message) + "\n")
                self._channel.flush()
        except OSError:
            os._exit(0)

    def read(self, stream: IO[bytes]) -> None:
        """Take requests and cancellations until the pipe closes."""
        for line in stream:
            message = json.loads(line)
            if "cancel" in message:
                self._cancels.setdefault(message["cancel"], threading.Event()).set()
            else:
                self._cancels.setdefault(message["id"], threading.Event())
                self._requests.put(message)
        # Native libraries may hang while they are unloaded.
        os._exit(0)

    def run(self, options: Message) -> None:
        """Load the model and answer for ever."""
        use = Use(**options.pop("use", {}))

        def tell(phase: str, last_s: float | None) -> None:
            self.send(phase=phase, last_s=last_s)

        try:
            backend = Local(Pipeline(**options, use=use, on_phase=tell, fallback=False))
        except OVAFMError as error:
            self.send(unusable=str(error))
            return
        self.send(ready=asdict(backend.info))
        while True:
            request = self._requests.get()
            self._answer(backend, request)
            del self._cancels[request["id"]]

    def _answer(self, backend: Local, request: Message) -> None:
        number, cancel = request["id"], self._cancels[request["id"]]
        try:
            params = Params(**{**request["params"], "stop": tuple(request["params"].get("stop", ()))})
            for step in backend.answer(request["messages"], params, cancel):
                self.send(id=number, **asdict(step))
        except OVAFMError as error:
            self.send(id=number, error=str(error))


def main() -> None:
    """Serve the pipe until it closes."""
    silence()
    # The pipes stay ours: what native code writes to descriptor 1 goes to the log.
    requests, channel = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    worker = Worker(channel)
    options = json.loads(requests.readline())
    threading.Thread(target=worker.read, args=(requests,), daemon=True).start()
    worker.run(options)
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    main()
