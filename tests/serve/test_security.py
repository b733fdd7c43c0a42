"""Who may ask: hosts and web pages where no key is asked for, keys, and what neither may reach."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support import serving

from ov_afm.serve.errors import APIError
from ov_afm.serve.hosts import HostRules

KEY = "s3cret"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def lowest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python with the lowest versions of everything that pyproject.toml allows for serving."""
    if shutil.which("uv") is None:
        pytest.fail("the lowest versions are tested with uv, which is not here: https://docs.astral.sh/uv/")
    folder = tmp_path_factory.mktemp("lowest")
    wanted, python = folder / "requirements.txt", folder / "venv/bin/python"
    options = ("--quiet", "--resolution", "lowest-direct", "--python", sys.executable)
    compiled = ("uv", "pip", "compile", *options, "--extra", "serve", ROOT / "pyproject.toml", "--output-file", wanted)
    for command in (
        compiled,
        ("uv", "venv", "--quiet", "--python", sys.executable, folder / "venv"),
        ("uv", "pip", "install", "--quiet", "--python", python, "--requirement", wanted),
    ):
        subprocess.run(command, check=True, timeout=600)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    # The package itself, without compiling its kernels again.
    (packages / "checkout.pth").write_text(f"{ROOT}\n")
    (packages / "ov_afm-0.dist-info").mkdir()
    (packages / "ov_afm-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: ov-afm\nVersion: 0\n")
    return python


VERSIONS = [
    pytest.param("installed", id="installed versions"),
    pytest.param("lowest", marks=(pytest.mark.slow, pytest.mark.network), id="lowest versions"),
]


@pytest.fixture(scope="module", params=VERSIONS)
def python(request: pytest.FixtureRequest) -> Path:
    return Path(sys.executable) if request.param == "installed" else request.getfixturevalue("lowest")


@pytest.fixture(scope="module")
def open_server(python: Path, tiny_model: Path) -> Iterator[serving.Server]:
    """A server without a key, which one more name leads to."""
    arguments = ("--allowed-host", "box.example", "--cors-origin", "https://ui.example")
    with serving.server(tiny_model, "--cache-size-gb", "0.02", *arguments, python=python) as running:
        yield running


@pytest.fixture(scope="module")
def locked(python: Path, tiny_model: Path) -> Iterator[serving.Server]:
    """A server with a key."""
    with serving.server(tiny_model, "--cache-size-gb", "0.02", "--api-key", KEY, python=python) as running:
        yield running


def ask(server: serving.Server, path: str, host: str | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of a GET with exactly this path and these headers, which client libraries would repair."""
    address = urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    try:
        connection.putrequest("GET", path, skip_host=True)
        connection.putheader("Host", address.netloc if host is None else host)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8000", "LocalHost.", "x.localhost", "box.example"])
def test_names_of_this_machine_may_ask(open_server: serving.Server, host: str) -> None:
    assert ask(open_server, "/v1/models", host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "192.168.1.5", "localhost.evil.example", "127.0.0.1.nip.io", "box"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/nothing", "/docs"])
def test_other_names_may_not(open_server: serving.Server, host: str, path: str) -> None:
    status, body = ask(open_server, path, host)
    assert status == 403
    assert b'"host_not_allowed"' in body
    assert b"--allowed-host" in body


MALFORMED = ["x/health?", "127.0.0.1/health?", "a@127.0.0.1", "127.0.0.1#", "x y", "127.0.0.1:80/health", "[::1", "ü"]


@pytest.mark.parametrize("host", MALFORMED)
def test_what_is_no_host_is_refused(open_server: serving.Server, host: str) -> None:
    assert ask(open_server, "/v1/models", host)[0] == 400


@pytest.mark.parametrize("host", [*MALFORMED, "evil.example", ""])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/chat/completions", "//health", "/health/../v1/models"])
def test_no_host_and_no_path_gets_past_the_key(locked: serving.Server, host: str, path: str) -> None:
    assert ask(locked, path, host)[0] in (400, 401)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": f"Bearer {KEY}"}, 200),
        ({"x_api_key": KEY}, 200),
        ({"x_api_key": f"{KEY}x"}, 401),
        ({"x_api_key": ""}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": f"Basic {KEY}"}, 401),
    ],
    ids=str,
)
def test_a_key_comes_in_openais_or_anthropics_header(
    locked: serving.Server, headers: dict[str, str], status: int
) -> None:
    assert ask(locked, "/v1/models", **headers)[0] == status


def test_with_a_key_any_name_leads_here(locked: serving.Server) -> None:
    assert ask(locked, "/v1/models", "models.example", authorization=f"Bearer {KEY}")[0] == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 403),
        ("null", 403),
        ("http://localhost.evil.example", 403),
        ("https://ui.example", 200),
        ("http://localhost:3000", 200),
        ("http://[::1]:3000", 200),
        ("vscode-webview://0abc", 200),
        ("app://obsidian.md", 200),
    ],
)
def test_pages_of_other_sites_may_not_ask(open_server: serving.Server, origin: str, status: int) -> None:
    assert ask(open_server, "/v1/models", origin=origin)[0] == status


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception", "strftime_now"]
)
def test_a_client_cannot_set_the_templates_own_variables(open_server: serving.Server, name: str) -> None:
    answer = open_server.chat(chat_template_kwargs={name: "x", "enable_thinking": False})
    assert answer.status_code == 400
    assert name in answer.json()["error"]["message"]
    assert "enable_thinking" not in answer.json()["error"]["message"]


def allowed(rules: HostRules, **headers: str) -> bool:
    try:
        rules.check([(name.encode(), value.encode()) for name, value in headers.items()])
    except APIError:
        return False
    return True


@pytest.mark.parametrize(
    "host", ["192.168.1.5", "[fe80::1]:8000", "10.0.0.7:80", "ovafm", "box.local", "a.b.svc", "a.internal", "[::1]"]
)
def test_a_server_for_the_network_takes_names_that_nobody_can_own(host: str) -> None:
    assert allowed(HostRules(local_only=False), host=host)


@pytest.mark.parametrize("host", ["evil.example", "192.168.1.5.nip.io", "local.evil.example", "evil.locale"])
def test_a_server_for_the_network_takes_no_public_name(host: str) -> None:
    assert not allowed(HostRules(local_only=False), host=host)
    assert allowed(HostRules(local_only=False, hosts={host}), host=f"{host}:443")
    assert allowed(HostRules(local_only=False, hosts={"*"}), host=host)


def test_a_page_of_the_same_host_may_ask() -> None:
    rules = HostRules(local_only=False)
    assert allowed(rules, host="192.168.1.5:8000", origin="http://192.168.1.5:8000")
    assert not allowed(rules, host="192.168.1.5:8000", origin="http://192.168.1.6:8000")
    assert allowed(HostRules(origins={"*"}), host="localhost", origin="https://anywhere.example")


def test_two_hosts_are_none(open_server: serving.Server) -> None:
    address = urlsplit(open_server.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
    connection.putrequest("GET", "/v1/models", skip_host=True)
    connection.putheader("Host", "127.0.0.1")
    connection.putheader("Host", "evil.example")
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()


@pytest.mark.parametrize("name", ["http://box", "box:80", "a b", ""])
def test_a_wrong_allowed_host_is_a_one_line_error(name: str, tiny_model: Path) -> None:
    command = (sys.executable, "-m", "ov_afm", "serve", tiny_model, "--allowed-host", name)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=os.environ)
    message = f"ov-afm: error: --allowed-host takes a name or an address without port, found {name!r}\n"
    assert (done.returncode, done.stderr) == (1, message)
