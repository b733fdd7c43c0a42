"""What HTTP itself asks of a server, from raw sockets: other versions and methods, slow clients, wrong paths."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from support import serving

from ov_afm.serve import http_server, middleware
from ov_afm.serve.errors import APIError

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[serving.Server]:
    with serving.server("--model", f"tiny={tiny_model}", "--cache-size-gb", "0.02") as running:
        yield running


def connect(port: int, host: str = "127.0.0.1", seconds: float = 20) -> socket.socket:
    return socket.create_connection((host, port), timeout=seconds)


def read(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def request(path: str, body: Any = None, method: str = "", version: str = "1.1", **headers: str) -> bytes:
    """A request whose answer ends the connection."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/{version}", "Host: 127.0.0.1"]
    given = {"Connection": "close", **({"Content-Type": "application/json"} if data else {}), **headers}
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in given.items()]
    lines += [f"Content-Length: {len(data)}"] if data else []
    return "\r\n".join([*lines, "", ""]).encode() + data


def exchange(server: serving.Server, sent: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and the body as it was sent."""
    with connect(port_of(server)) as connection:
        connection.sendall(sent)
        said = read(connection)
    head, _, body = said.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


def port_of(server: serving.Server) -> int:
    return int(server.url.rpartition(":")[2])


def test_a_client_that_offers_http_2_keeps_its_body(server: serving.Server) -> None:
    # As Java's HttpClient sends it, here where httptools is installed too.
    import httptools  # noqa: F401

    offer = {"Connection": "Upgrade, HTTP2-Settings, close", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAB"}
    status, _, body = exchange(server, request("/v1/chat/completions", CHAT, **offer))
    assert status == 200
    assert json.loads(body)["usage"]["completion_tokens"] > 0
    assert not any("upgrade" in line.lower() for line in server.log)


def test_a_websocket_is_refused_at_once(server: serving.Server) -> None:
    asked = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}
    begun = time.monotonic()
    with connect(port_of(server)) as connection:
        connection.sendall(request("/v1/realtime", **asked))
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, br"])
def test_an_encoded_body_is_refused_by_its_encoding(server: serving.Server, encoding: str) -> None:
    status, headers, body = exchange(
        server, request("/v1/chat/completions", b"\x1f\x8b\x08", Content_Encoding=encoding)
    )
    assert (status, headers["accept-encoding"]) == (415, "identity")
    error = json.loads(body)["error"]
    assert error["code"] == "unsupported_encoding"
    assert repr(encoding) in error["message"]
    assert exchange(server, request("/v1/chat/completions", CHAT, Content_Encoding="identity"))[0] == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny", "/health", "/metrics", "/version", "/docs"])
def test_head_is_get_without_the_body(server: serving.Server, path: str) -> None:
    status, headers, body = exchange(server, request(path, method="HEAD"))
    assert (status, body) == (200, b"")
    got = exchange(server, request(path))
    assert headers["content-type"] == got[1]["content-type"]
    assert exchange(server, request("/v1/chat/completions", method="HEAD"))[0] == 405


def test_options_name_the_methods(server: serving.Server) -> None:
    def allowed(path: str) -> tuple[int, str | None]:
        status, headers, _ = exchange(server, request(path, method="OPTIONS"))
        return status, headers.get("allow")

    assert allowed("/v1/models") == (204, "get, head, options")
    assert allowed("/v1/chat/completions") == (204, "options, post")
    assert allowed("*")[0] == 204
    assert allowed("/nothing") == (404, None)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "TRACE", "FROB"])
def test_a_wrong_method_gets_the_right_one(server: serving.Server, method: str) -> None:
    status, headers, body = exchange(server, request("/v1/chat/completions", method=method))
    assert (status, headers["allow"]) == (405, "options, post")
    assert json.loads(body)["error"]["message"] == f"/v1/chat/completions takes POST, not {method}"


WRONG = {
    "/chat/completions": "/v1/chat/completions",
    "/v1/v1/chat/completions": "/v1/chat/completions",
    "//v1/chat/completions": "/v1/chat/completions",
    "/v1/chat/completions/": "/v1/chat/completions",
    "/v1/chat": "/v1/chat/completions",
    "/V1/Chat/Completions": "/v1/chat/completions",
    "/api/v1/chat/completions": "/v1/chat/completions",
    "/openai/v1/models": "/v1/models",
    "/openai/deployments/tiny/chat/completions": "/v1/chat/completions",
    "/v1/chat/completion": "/v1/chat/completions",
    "/completions": "/v1/completions",
    "/models": "/v1/models",
    "/v1/models/": "/v1/models",
    "/v1": "/v1/models",
    "/v1/tokenize": "/tokenize",
    "/v1/health": "/health",
}


@pytest.mark.parametrize(("path", "meant"), WRONG.items(), ids=WRONG)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_wrong_path_gets_the_right_one(server: serving.Server, path: str, meant: str, method: str) -> None:
    status, _, body = exchange(server, request(path, CHAT if method == "POST" else None))
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (404, "not_found")
    assert re.search(rf"; it is {meant}\b(?!/)", error["message"]), error["message"]
    assert ("base URL" in error["message"]) == meant.startswith("/v1/")


def test_a_path_like_no_other_gets_no_guess(server: serving.Server) -> None:
    _, _, body = exchange(server, request("/zebra"))
    assert json.loads(body)["error"]["message"] == "no such route: /zebra; see /docs"


STREAMS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"prompt": "x", "max_tokens": 4},
    "/v1/messages": {"model": "tiny", **CHAT},
    "/v1/responses": {"input": "x", "max_output_tokens": 16},
    "/api/chat": {"model": "tiny", "messages": CHAT["messages"]},
}


@pytest.mark.parametrize(("path", "body"), STREAMS.items(), ids=STREAMS)
def test_a_stream_is_neither_kept_nor_collected_on_its_way(
    server: serving.Server, path: str, body: dict[str, Any]
) -> None:
    status, headers, _ = exchange(server, request(path, {**body, "stream": True}))
    assert status == 200
    assert headers["x-accel-buffering"] == "no"
    assert headers["cache-control"] == "no-cache"
    assert headers["transfer-encoding"] == "chunked"


@pytest.mark.parametrize("stream", [True, False])
def test_http_1_0_gets_no_chunks(server: serving.Server, stream: bool) -> None:
    sent = request("/v1/chat/completions", {**CHAT, "stream": stream}, version="1.0", Connection="keep-alive")
    status, headers, body = exchange(server, sent)
    assert status == 200
    assert "transfer-encoding" not in headers
    if stream:
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")
        assert headers["connection"] == "close"
    else:
        json.loads(body)


def test_requests_in_one_packet_are_answered_in_order(server: serving.Server) -> None:
    first = request("/v1/chat/completions", CHAT, Connection="keep-alive")
    _, _, body = exchange(server, first + request("/version"))
    assert body.count(b"HTTP/1.1 200 OK") == 1
    assert body.index(b"chat.completion") < body.index(b'"version"')


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 100_000])
def test_what_is_no_http_is_refused_in_the_form_of_every_error(server: serving.Server, sent: bytes) -> None:
    status, _, body = exchange(server, sent)
    assert (status, json.loads(body)["error"]["code"]) == (400, "invalid_http")


def test_localhost_is_both_loopback_addresses(server: serving.Server) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no ::1")
    for host in ("127.0.0.1", "::1"):
        with connect(port_of(server), host) as connection:
            connection.sendall(request("/health"))
            assert read(connection).endswith(b'{"status":"ok"}')


@pytest.mark.parametrize("taken", ["127.0.0.1", "::1"])
def test_a_port_that_is_taken_on_one_of_them_is_a_one_line_error(taken: str, tiny_model: Path) -> None:
    with socket.socket(socket.AF_INET6 if ":" in taken else socket.AF_INET) as other:
        try:
            other.bind((taken, 0))
        except OSError:
            pytest.skip(f"this machine has no {taken}")
        other.listen()
        port = other.getsockname()[1]
        command = (sys.executable, "-m", "ov_afm", "serve", tiny_model, "--port", str(port))
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert f"port {port} on localhost: Address already in use; choose another with --port" in done.stderr


def test_one_address_listens_on_that_alone() -> None:
    (only,) = http_server.open_sockets("127.0.0.1", 0)
    with only:
        assert only.getsockname()[0] == "127.0.0.1"


@pytest.mark.slow
def test_slow_clients_are_cut_off_and_idle_ones_are_not(server: serving.Server) -> None:
    """With the real limits: a half head and a half body end after 20 s, an idle connection lives."""

    def half(sent: bytes) -> tuple[bytes, float]:
        begun = time.monotonic()
        with connect(port_of(server), seconds=40) as connection:
            connection.sendall(sent)
            return read(connection), time.monotonic() - begun

    whole = request("/v1/chat/completions", CHAT)
    with ThreadPoolExecutor(2) as pool, connect(port_of(server)) as idle:
        ends = [pool.submit(half, whole[:60]), pool.submit(half, whole[:-5])]
        idle.sendall(request("/version", Connection="keep-alive"))
        idle.recv(1 << 16)
        for said, seconds in (each.result() for each in ends):
            assert said.startswith(b"HTTP/1.1 408 ")
            assert json.loads(said.partition(b"\r\n\r\n")[2])["error"]["code"] == "timeout"
            assert 18 < seconds < 25
        idle.sendall(request("/version"))
        assert b"HTTP/1.1 200 " in read(idle)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body and sends as many bytes as the path says."""
    assert scope["type"] == "http"
    count = int(scope["path"].strip("/") or 2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(count).encode())]})
    for _ in range(count // 1000):
        await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
    await send({"type": "http.response.body", "body": b"x" * (count % 1000)})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, uvicorn.Server]]:
    """The port of a server with all time limits a hundredth of what they are, and the server."""
    for module, name in (
        (http_server, "HEAD_S"),
        (http_server, "KEEP_ALIVE_S"),
        (http_server, "SEND_S"),
        (middleware, "BODY_S"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) / 100)
    # A byte is worth the same time as before.
    monkeypatch.setattr(middleware, "LEAST_BYTES_PER_S", middleware.LEAST_BYTES_PER_S * 100)
    app = middleware.BodyChecks(application, max_body_bytes=10_000)
    running = uvicorn.Server(http_server.configuration(app, grace_s=1))
    running.config.lifespan = "off"
    sockets = http_server.open_sockets("127.0.0.1", 0)
    thread = threading.Thread(target=running.run, args=(sockets,))
    thread.start()
    while not running.started:
        time.sleep(0.01)
    try:
        yield sockets[0].getsockname()[1], running
    finally:
        running.should_exit = True
        thread.join()


def drip(connection: socket.socket, data: bytes, seconds: float = 0.01) -> None:
    with contextlib.suppress(OSError):
        for index in range(len(data)):
            connection.sendall(data[index : index + 1])
            time.sleep(seconds)


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n"
SLOW: dict[str, tuple[Callable[[socket.socket], object], bytes]] = {
    "says nothing": (lambda _: None, b""),
    "half a head": (lambda connection: connection.sendall(HEAD), b"HTTP/1.1 408 "),
    "a dripping head": (lambda connection: drip(connection, HEAD + b"X-Header: 1\r\n" * 99), b"HTTP/1.1 408 "),
    "no body": (lambda connection: connection.sendall(HEAD + b"\r\n"), b"HTTP/1.1 408 "),
    "half a body": (lambda connection: connection.sendall(HEAD + b"\r\n" + b"x" * 2500), b"HTTP/1.1 408 "),
    "a dripping body": (lambda connection: drip(connection, HEAD + b"\r\n" + b"x" * 5000, 0.005), b"HTTP/1.1 408 "),
    "chunks that do not end": (
        lambda connection: connection.sendall(
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
        ),
        b"HTTP/1.1 408 ",
    ),
    "too long a body that does not come": (
        lambda connection: connection.sendall(HEAD.replace(b"5000", b"50000") + b"\r\n"),
        b"HTTP/1.1 413 ",
    ),
    "idle": (lambda connection: connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), b"HTTP/1.1 200 "),
}


@pytest.mark.parametrize(("sends", "answer"), SLOW.values(), ids=SLOW)
def test_every_way_to_be_slow_ends(
    quick: tuple[int, uvicorn.Server], sends: Callable[[socket.socket], object], answer: bytes
) -> None:
    begun = time.monotonic()
    with connect(quick[0]) as connection:
        thread = threading.Thread(target=sends, args=(connection,))
        thread.start()
        said = read(connection)
        assert time.monotonic() - begun < 3
        thread.join()
    assert said.startswith(answer)
    assert bool(said) == bool(answer)


def test_a_client_that_does_not_read_is_gone_after_a_while(quick: tuple[int, uvicorn.Server]) -> None:
    port, running = quick
    with connect(port) as connection:
        connection.sendall(b"GET /100000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline = time.monotonic() + 10
        while not running.server_state.tasks:
            assert time.monotonic() < deadline
        while running.server_state.connections:
            assert time.monotonic() < deadline, "the connection is kept"
            time.sleep(0.01)


def test_a_client_that_reads_slowly_gets_everything(quick: tuple[int, uvicorn.Server]) -> None:
    with connect(quick[0]) as connection:
        connection.sendall(b"GET /20000000 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        got = 0
        while part := connection.recv(1 << 16):
            got += len(part)
            time.sleep(0.005)
    assert got > 20_000_000


def test_an_error_outside_of_any_route_has_its_apis_form() -> None:
    error = APIError("no", code="x", status=404)
    assert error.body("/v1/chat/completions") == error.body("/api/v1/models") == error.envelope
    assert error.body("/api/chat") == {"error": "no"}
    assert error.body("/v1/messages")["error"] == {"type": "not_found_error", "message": "no"}
    assert error.body("/v1/messages/count_tokens")["type"] == "error"
    assert error.body("/apiary") == error.envelope
