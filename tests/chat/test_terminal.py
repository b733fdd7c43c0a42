"""The chat on a terminal: through a pseudo-terminal as people use it, and through pipes as scripts do."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.chatting import server_that_says

from ov_afm.chat.terminal_markdown import complete_until, printable
from ov_afm.cli.chat import main

pexpect = pytest.importorskip("pexpect")
needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals of this kind are POSIX's")
CHAT = [sys.executable, "-m", "ov_afm", "chat"]
ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[a-zA-Z]|\][^\x07]*\x07|[=>])")


class Window:
    """A chat in a terminal of 100 columns."""

    def __init__(self, *arguments: str | Path) -> None:
        self.child = pexpect.spawn(
            CHAT[0],
            [*CHAT[1:], *map(str, arguments), "--greedy", "--max-new-tokens", "12"],
            dimensions=(40, 100),
            encoding="utf-8",
            timeout=60,
            env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        self.expect("/help shows the commands")
        self.expect("›")

    def expect(self, text: str) -> str:
        """Wait for text; returns what came before it, without escape sequences."""
        self.child.expect(text)
        return ESCAPES.sub("", self.child.before)

    def say(self, line: str) -> None:
        """Type a line and send it."""
        self.child.send(line)
        self.child.send("\r")


@pytest.fixture(scope="module", autouse=True)
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        data = tmp_path_factory.mktemp("terminal") / "data"
        patch.setenv("OV_AFM_DATA", str(data))
        yield data


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> Iterator[Window]:
    running = Window(tiny_model)
    yield running
    running.child.ptyproc.delayafterterminate = 2  # a killed process gives its memory back first
    running.child.close(force=True)


@pytest.fixture
def window(opened: Window) -> Window:
    """A window with a new conversation."""
    opened.say("/system -")
    opened.expect("system prompt: none")
    opened.say("/new")
    opened.expect("a new conversation")
    # Before the next prompt the terminal would take the keys as lines.
    opened.expect("›")
    return opened


def piped(*arguments: Any, text: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*CHAT, *map(str, arguments)], input=text, capture_output=True, timeout=120)


@pytest.mark.slow
def test_pipe_prints_only_the_answer(tiny_model: Path) -> None:
    few = ("--greedy", "--max-new-tokens", "8")
    answered = piped(tiny_model, *few, text=b"hi\n")
    assert (answered.returncode, answered.stderr) == (0, b"")
    generated = subprocess.run(
        [sys.executable, "-m", "ov_afm", "generate", str(tiny_model), "hi", *few], capture_output=True, timeout=120
    )
    assert answered.stdout == generated.stdout
    assert len(answered.stdout) > 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "the question on standard input is empty; pipe some text in, or run in a terminal to chat"),
        (b"caf\xe9", "the question on standard input is not UTF-8: byte 0xe9 at offset 3"),
    ],
    ids=["empty", "bytes"],
)
def test_bad_pipe_is_one_line(
    tmp_path: Path, text: bytes, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    # Told before any model is looked for.
    assert main([str(tmp_path / "absent")]) == 1
    assert tuple(capsys.readouterr()) == ("", f"ov-afm: error: {expected}\n")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("absent", "no such model directory: "),
        ("smollm2-135m-instruct", "smollm2-135m-instruct is not an OpenVINO model directory; run: ov-afm export "),
        (".", ". is not a whole model directory: openvino_model.xml, "),
    ],
    ids=["absent", "source", "empty"],
)
def test_a_wrong_model_is_one_line(
    tmp_path: Path, name: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi")))
    for options in ([], ["--ui", "--no-browser"]):
        assert main([name, *options]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("ov-afm: error: ")
        assert expected.removeprefix(".") in shown.err
        assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give a model directory, or --url of a server"),
        (["a", "b"], "one model directory at a time, found 2; several need --ui"),
        (["a", "--share"], "--share needs --ui"),
        (["a", "--host", "0.0.0.0"], "--host needs --ui"),
    ],
    ids=["nothing", "two", "share", "host"],
)
def test_wrong_usage_is_status_2(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"ov-afm chat: error: {expected}; ov-afm chat --help shows the options\n"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("example", "--url takes an address such as http://127.0.0.1:8000/v1, found 'example'"),
        ("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1/models does not answer as an OpenAI-compatible server: "),
    ],
    ids=["no-address", "nobody"],
)
def test_wrong_url_is_one_line(
    url: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hi")))
    assert main(["--url", url]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"ov-afm: error: {expected}")
    assert shown.count("\n") == 1


@needs_terminal
def test_a_question_may_begin_with_a_slash(window: Window) -> None:
    window.say("/etc/hosts is what?")
    window.expect("no command /etc/hosts; /help shows the commands; with a space before it")
    window.say(" /etc/hosts is what?")
    window.expect("12 tokens")
    window.expect("›")


@needs_terminal
def test_a_loaded_conversation_is_shown(window: Window, tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    turns = [{"role": "user", "content": "What is a fjord?"}, {"role": "assistant", "content": "A drowned valley."}]
    file.write_text(json.dumps({"ov_afm_chat": 1, "title": "", "system": "", "messages": turns}))
    window.say(f"/load {file}")
    window.expect("loaded 2 messages from ")
    window.expect("What is a fjord[?]")
    window.expect("A drowned valley.")
    window.expect("›")


@needs_terminal
def test_a_conversation_with_every_command(window: Window, tmp_path: Path) -> None:
    window.say("/stats")
    window.expect("no answer yet")
    window.say("/regen")
    window.expect("there is no question to answer again")
    window.say("/nonsense")
    window.expect("no command /nonsense; /help shows the commands")
    window.say("What is the capital of France?")
    window.expect(r"tokens/s · \d+ tokens · CPU · int8")
    window.say("/regen")
    window.expect(r"tokens/s · \d+ tokens · CPU · int8")
    window.say("/system Be brief.")
    window.expect("system prompt: Be brief.")
    window.say("/stats")
    window.expect(r"context: \d+ of 2,560 tokens")
    window.say(f"/save {tmp_path / 'talk.json'}")
    window.expect("saved 2 messages")
    window.say(f"/save {tmp_path / 'talk.md'}")
    window.expect("saved 2 messages")
    (tmp_path / "notes.md").write_text("mine")
    window.say(f"/save {tmp_path / 'notes.md'}")
    window.expect(r"(?:\s|\x1b\[[\d;?]*[A-Za-z])+".join(["choose", "another", "file", "name"]))
    assert (tmp_path / "notes.md").read_text() == "mine"
    for name in ("talk.json", "talk.md"):
        window.say(f"/save {tmp_path / name}")
        window.expect("saved 2 messages")
    window.say("/new")
    window.expect("a new conversation")
    window.say(f"/load {tmp_path / 'talk.json'}")
    window.expect("loaded 2 messages")
    window.say("/load /nowhere/talk.json")
    window.expect("cannot be read: No such file or directory")
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert saved["system"] == "Be brief."
    assert [each["role"] for each in saved["messages"]] == ["user", "assistant"]
    assert saved["messages"][1]["figures"]["device"] == "CPU"
    markdown = (tmp_path / "talk.md").read_text(encoding="utf-8")
    assert markdown.startswith("# What is the capital of France?\n\n> Be brief.\n\n## You\n\nWhat is the capital")


@pytest.mark.slow
@needs_terminal
def test_ctrl_c_stops_the_answer_and_keeps_the_chat() -> None:
    with server_that_says("word " * 400, pause_s=0.05) as url:
        window = Window("--url", url)
        window.say("A long one, please.")
        window.expect("word word word")
        window.child.sendintr()
        window.expect("stopped")
        window.say("/stats")
        window.expect(r"context: \d+ tokens used")
        window.say("/device GPU")
        window.expect("the server chooses the device")
        window.expect("›")
        window.child.sendintr()
        window.expect("Ctrl-D or /exit leaves")
        # Before the next prompt the terminal would keep the key to itself.
        window.expect("›")
        window.child.sendeof()
        window.child.expect(pexpect.EOF)
        window.child.close()
    assert window.child.exitstatus == 0


@needs_terminal
def test_several_lines_are_one_question(window: Window, tmp_path: Path) -> None:
    window.child.send("first line\x1b\rsecond line")
    window.child.send("\r")
    window.expect("tokens/s")
    window.child.send("\x1b[200~pasted one\npasted two\x1b[201~\r")
    window.expect("tokens/s")
    window.say(f"/save {tmp_path / 'talk.json'}")
    window.expect("saved 4 messages")
    turns = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))["messages"]
    assert turns[0]["content"] == "first line\nsecond line"
    assert turns[2]["content"] == "pasted one\npasted two"


@pytest.mark.slow
@needs_terminal
def test_device_is_changed_and_a_wrong_one_leaves_the_old(window: Window) -> None:
    window.say("/device FOO")
    window.expect("device 'FOO' is not here")
    window.expect("›")
    window.say("/device NPU-EMULATED")
    window.expect("running on emulated NPU")
    window.say("hello")
    window.expect("emulated NPU · int8")
    window.say("/device CPU")
    window.expect("running on CPU")


@pytest.mark.slow
@needs_terminal
def test_history_is_kept_for_this_user_alone(window: Window, tiny_model: Path, own_data: Path) -> None:
    window.say("remember me")
    window.expect("tokens/s")
    assert (own_data / "history").stat().st_mode & 0o077 == 0
    again = Window(tiny_model)
    again.child.send("\x1b[A")
    again.expect("remember me")
    again.child.sendintr()
    again.say("/exit")
    again.child.expect(pexpect.EOF)
    again.child.close()
    assert again.child.exitstatus == 0


def test_text_of_a_model_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\r\n\tc\x9bd") == "a�]0;title�b�\n\tc�d"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("one\n\ntwo", "one\n\n"),
        ("one\ntwo", ""),
        ("```py\na\n\nb\n", ""),
        ("```py\na\n\nb\n```\n\nc", "```py\na\n\nb\n```\n\n"),
        ("````\n```\n\n````\n\nx", "````\n```\n\n````\n\n"),
    ],
    ids=["paragraph", "open", "open-code", "code", "nested-fence"],
)
def test_markdown_is_printed_block_by_block(text: str, printed: str) -> None:
    assert text[: complete_until(text)] == printed
