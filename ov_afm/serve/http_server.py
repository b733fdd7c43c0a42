"""uvicorn with what a server for agents needs besides: time limits for slow clients, and both loopback addresses.

The parser is h11 and no other. httptools, which uvicorn prefers where it is installed, takes a request with
`Upgrade: h2c` (Java's HttpClient sends it) for one without a body, and sends chunks to HTTP/1.0.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ConfigError, DeviceError
from ..system import console
from .app import build
from .errors import APIError
from .hosts import LOCALHOST
from .registry import Models
from .service import Settings

__all__ = ["configuration", "open_sockets", "run"]

LOOPBACKS = ("127.0.0.1", "::1")
# Seconds that a client has for the head of a request, and between requests.
HEAD_S = 20.0
KEEP_ALIVE_S = 75
# A client that has not read for so long has gone, whatever its socket says.
SEND_S = 60.0
MAX_HEAD_BYTES = 64 * 1024
# Free ports that are tried until one is free on both loopback addresses.
PORT_TRIES = 20
BACKLOG = 2048


class Protocol(H11Protocol):
    """One connection, which a client cannot keep open by sending or reading too slowly.

    The body's time limit is `middleware.BodyChecks`', except for a body that nobody waits for any more.
    """

    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection that says nothing is closed like one between two requests."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(KEEP_ALIVE_S, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is left to wait for."""
        super().connection_lost(exc)
        for timer in (self._head_timer, self._send_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """More of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The next request may have begun already."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Begin the time limit of a head, or of a body that was answered before it was complete; end it otherwise."""
        their, our = self.conn.their_state, self.conn.our_state
        begun = their is h11.IDLE and bool(self.conn.trailing_data[0])
        unread = their is h11.SEND_BODY and our in (h11.DONE, h11.MUST_CLOSE)
        if not begun and not unread:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None or self._head_timer.when() - self.loop.time() > HEAD_S:
            # From the first byte: further bytes do not begin it anew.
            if self._head_timer is not None:
                self._head_timer.cancel()
            self._head_timer = self.loop.call_later(HEAD_S, self._late)

    def _late(self) -> None:
        if self.conn.our_state is h11.IDLE and not self.transport.is_closing():
            late = APIError(f"the head of the request took more than {HEAD_S:g} s", code="timeout", status=408)
            self._refuse(late)
        self._close()

    def _close(self) -> None:
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the form of every error."""
        self._refuse(APIError("this is no HTTP/1.1 request that the server can read", code="invalid_http"))
        self._close()

    def _refuse(self, error: APIError) -> None:
        body = json.dumps(error.envelope).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError):
            response = h11.Response(status_code=error.status, headers=headers)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer comes."""
        super().pause_writing()
        self._send_timer = self._send_timer or self.loop.call_later(SEND_S, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _unsupported_upgrade_warning(self) -> None:
        """Clients may offer another protocol with every request; the log need not say so."""


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on an address; `localhost` is 127.0.0.1 and, where the machine has it, ::1, on one port.

    Args:
        host: Address or name.
        port: Port; 0 takes a free one.

    Raises:
        ConfigError: The address cannot be listened on.
    """
    for _ in range(PORT_TRIES if port == 0 and host == LOCALHOST else 1):
        sockets: list[socket.socket] = []
        try:
            for family, address in _addresses(host):
                chosen = sockets[0].getsockname()[1] if sockets else port
                sockets += _bind(family, address, chosen, optional=host == LOCALHOST and bool(sockets))
            return sockets
        except OSError as error:
            for each in sockets:
                each.close()
            failure = error
    in_use = failure.errno == errno.EADDRINUSE
    remedy = "choose another with --port" if in_use else "choose another with --host and --port"
    raise ConfigError(f"port {port} on {host}: {failure.strerror or failure}; {remedy}", code="address") from failure


def _addresses(host: str) -> list[tuple[int, str]]:
    if host == LOCALHOST:
        return [(socket.AF_INET, LOOPBACKS[0]), *([(socket.AF_INET6, LOOPBACKS[1])] if socket.has_ipv6 else [])]
    entries = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((int(family), str(address[0])) for family, _, _, _, address in entries))


def _bind(family: int, address: str, port: int, *, optional: bool) -> list[socket.socket]:
    """A socket that listens; none where it is optional and the machine does not have the address.

    Raises:
        OSError: The address cannot be listened on.
    """
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError:
        if optional:
            return []
        raise
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
        # Before the model is loaded: only now is it certain that no other program has the port.
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if optional and error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return []
        raise
    listener.set_inheritable(False)
    return [listener]


def configuration(app: ASGIApp, *, grace_s: float) -> uvicorn.Config:
    """How uvicorn runs an application.

    Args:
        app: The application.
        grace_s: Seconds that running requests get to finish after the signal.
    """
    return uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
    )


def run(models: Models, settings: Settings, *, host: str, port: int, grace_s: float) -> None:
    """Serve until a signal, or until the only model turns out to be unusable.

    Args:
        models: The models on offer.
        settings: How to behave.
        host: Address to listen on; `localhost` is both loopback addresses.
        port: Port to listen on; 0 takes a free one.
        grace_s: Seconds that running requests get to finish after the signal.

    Raises:
        ConfigError: The address cannot be listened on.
        DeviceError: A model cannot be loaded.
    """
    sockets = open_sockets(host, port)
    config = configuration(build(models, settings), grace_s=grace_s)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for each in sockets or []:
                console.note(f"listening on {_url(each)}/v1 (pid {os.getpid()})")

    server = Server(config)
    for name, engine in models.engines.items():
        engine.on_ready = lambda info, name=name: console.note(  # type: ignore[misc]
            f"serving {name} on {info.device}, context {info.context_length} tokens"
        )
        if len(models.engines) == 1:
            engine.on_unusable = lambda: setattr(server, "should_exit", True)
    # uvicorn raises the signal again when it is done; that must not end the process with the signal's status.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    server.run(sockets)
    for engine in models.engines.values():
        if engine.problem is not None:
            raise DeviceError(engine.problem)


def _url(listener: socket.socket) -> str:
    address, port = listener.getsockname()[:2]
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
