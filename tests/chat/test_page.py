"""The chat's page without a browser: who may reach it, what it gives away, and how it refuses to start."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from support.chatting import Chat, chat, server_that_says

from ov_afm.chat.conversation import Conversation, Turn
from ov_afm.chat.models import DeviceRow, ModelManager, find_models, recommended_sampling
from ov_afm.chat.remote import Remote
from ov_afm.chat.session import View
from ov_afm.chat.web.handlers import Handlers
from ov_afm.chat.web.html import figures_table, gauge, note, progress, refused_devices, report_frame, status
from ov_afm.cli.chat import main
from ov_afm.errors import SourceError
from ov_afm.runtime import devices
from ov_afm.runtime.sampling import Params

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with server_that_says("Hello.") as url, chat("--url", url, data=tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.mark.parametrize(
    "route",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file=..%2f..%2fetc%2fpasswd",
        "/gradio_api/file%3D/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=http://127.0.0.1:1/",
        "/gradio_api/stream/a/b/1/playlist.m3u8",
    ],
)
def test_no_file_can_be_read(remote: Chat, route: str) -> None:
    answer = httpx.get(remote.url + route)
    assert answer.status_code == 403
    assert answer.text == "this chat gives no files away"


def test_nothing_can_be_uploaded(remote: Chat) -> None:
    assert httpx.post(f"{remote.url}/gradio_api/upload", files={"files": b"x"}).status_code == 403


def test_the_page_loads_nothing_from_elsewhere(remote: Chat) -> None:
    answer = httpx.get(remote.url)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    scripts = policy.partition("script-src")[2].partition(";")[0]
    assert "'unsafe-inline'" not in scripts
    assert "'sha256-" in scripts
    assert not re.findall(r"(?:src|href)=\"https?:", answer.text)


def test_another_sites_name_for_this_machine_is_refused(remote: Chat) -> None:
    assert httpx.get(remote.url, headers={"Host": "evil.example"}).status_code == 421


def test_it_listens_on_this_machine_only(remote: Chat) -> None:
    assert remote.url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--share"], "--share and --host open the chat to others; give --auth USER:PASSWORD too"),
        (["--host", "0.0.0.0"], "--share and --host open the chat to others; give --auth USER:PASSWORD too"),
        (["--auth", "ann"], "--auth takes USER:PASSWORD"),
        (["--port", "70000"], "cannot listen on 127.0.0.1 port 70000: "),
    ],
    ids=["share", "host", "auth", "port"],
)
def test_an_open_page_is_refused(
    options: list[str], expected: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--ui", str(tiny_model), *options]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"ov-afm: error: {expected}")
    assert shown.count("\n") == 1


def test_a_taken_port_is_refused(remote: Chat, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = remote.url.rpartition(":")[2]
    assert main(["--ui", str(tiny_model), "--port", port]) == 1
    assert "choose another --port" in capsys.readouterr().err


@pytest.mark.slow
def test_a_name_and_password_are_asked_for(tmp_path: Path) -> None:
    with server_that_says("Hello.") as url, chat("--url", url, "--auth", "ann:secret", data=tmp_path) as running:
        assert httpx.get(f"{running.url}/config").status_code == 401
        wrong = httpx.post(f"{running.url}/login", data={"username": "ann", "password": "wrong"})
        assert wrong.status_code == 400
        right = httpx.post(f"{running.url}/login", data={"username": "ann", "password": "secret"})
        assert right.status_code == 200
        assert httpx.get(f"{running.url}/config", cookies=right.cookies).status_code == 200


def test_models_are_found_in_a_folder(tiny_model: Path, tmp_path: Path) -> None:
    assert [each.path for each in find_models([str(tiny_model.parent)])] == [str(tiny_model.resolve())]
    (model,) = find_models([str(tiny_model), str(tiny_model)])
    assert re.fullmatch(r"tiny-int8 · int8 · [\d.]+ [kM]B", model.label)
    with pytest.raises(SourceError, match="is not a whole model directory"):
        find_models([str(tmp_path)])
    with pytest.raises(SourceError, match="no such model directory"):
        find_models([str(tmp_path / "absent")])


def test_a_broken_model_in_a_folder_is_left_out(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "openvino_model.xml").touch()
    shutil.copytree(tiny_model, tmp_path / "whole")
    assert [each.directory.name for each in find_models([str(tmp_path)])] == ["whole"]
    shown = capsys.readouterr().err
    assert shown.startswith(f"note: left out: {tmp_path / 'broken'} is not a whole model directory: ")
    assert shown.count("\n") == 1


def test_devices_that_cannot_run_the_model_have_the_reason(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npu = devices.DeviceInfo("NPU", "Intel AI Boost", None, None, ())
    # No such device exists here.
    inventory = devices.Inventory((npu,), {"GPU": "the driver <died>"})
    monkeypatch.setattr(devices, "inventory", lambda: inventory)
    with server_that_says("Hello.") as url:
        models = ModelManager(find_models([str(tiny_model)]), remote=Remote(url))
    rows = models.device_rows(str(tiny_model.resolve()))
    assert [(row.name, bool(row.refused)) for row in rows] == [
        ("NPU", True),
        ("GPU", True),
        ("CPU", True),
        ("NPU-EMULATED", False),
    ]
    shown = refused_devices(rows)
    assert "<li>NPU – Intel AI Boost: cannot run weight format int8, needs int4 symmetric weights</li>" in shown
    assert "the driver &lt;died&gt;" in shown
    assert "<li>CPU: not in this machine</li>" in shown


@pytest.mark.parametrize("evil", ["<script>x</script>", '" onload="x', "' onload='x", "&lt;b>"])
def test_no_value_becomes_html(evil: str) -> None:
    escaped = {"<": "&lt;", ">": "&gt;", '"': "&#34;", "'": "&#39;"}
    view = View(Conversation(turns=[Turn("assistant", "x", {"prompt_tokens": 1, "new_tokens": 1})]))
    models: Any = SimpleNamespace(reserved=evil)
    pieces = [
        status(models),
        note(evil, "alert"),
        progress(1, 2, evil),
        refused_devices([DeviceRow("x", evil, evil)]),
        figures_table([evil], [(evil, [evil])]),
        report_frame(evil),
    ]
    expected = "".join(escaped.get(letter, letter) for letter in evil.replace("&", "&amp;"))
    for piece in pieces:
        assert expected in piece
        assert evil not in piece
    assert "2 tokens used" in gauge(view, None)


def test_a_server_is_told_only_what_was_moved() -> None:
    session: Any = SimpleNamespace(models=SimpleNamespace(remote=True, loaded=None), store=None)
    given = Params(top_p=0.5, seed=3)
    handlers = Handlers(session, given, "")
    start = handlers.slider_values()
    assert handlers.params(*start) == given
    assert handlers.params(0.3, *start[1:]) == replace(given, temperature=0.3)
    greedy = Handlers(session, Params(greedy=True), "")
    assert greedy.params(*greedy.slider_values()) == Params(greedy=True)
    assert greedy.params(0.7, *greedy.slider_values()[1:]) == Params(temperature=0.7)


@pytest.mark.slow
def test_sampling_begins_with_what_the_model_recommends(tmp_path: Path) -> None:
    assert recommended_sampling(tmp_path)["temperature"] == 1.0
    config = tmp_path / "generation_config.json"
    config.write_text('{"temperature": 0.5}')
    assert recommended_sampling(tmp_path)["temperature"] == 0
    config.write_text('{"do_sample": true, "temperature": 0.5, "top_k": -1, "top_p": null}')
    values = recommended_sampling(tmp_path)
    assert (values["temperature"], values["top_k"], values["top_p"]) == (0.5, 0, 1.0)
    config.write_text('{"do_sample": true, "temperature": "x"}')
    assert recommended_sampling(tmp_path)["temperature"] == 1.0
