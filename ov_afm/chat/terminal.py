"""The chat on a terminal: line editing, Markdown, commands that begin with a slash.

Where input or output is no terminal it behaves as a filter: one question in, the answer alone out.
"""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigError, GenerationError, OVAFMError
from ..model_dir.outputs import check_file
from ..runtime import devices
from ..runtime.sampling import Params
from ..system import console
from ..system.atomic import write_text
from ..system.interrupt import leave_at_once
from ..system.paths import expanded
from .backend import EMULATED, Backend, Step, figures_of
from .conversation import Conversation, Turn, context_line, figures_line, from_json, to_json, to_markdown
from .store import data_dir
from .terminal_markdown import MarkdownStream, printable

__all__ = ["Terminal", "answer_pipe", "read_question"]

HELP = """\
/help            show these commands
/system [TEXT]   show the system prompt, or set it; /system - removes it
/device [NAME]   show devices, or load the model on another; the conversation stays
/save FILE       write the conversation: .md for people, anything else as JSON
/load FILE       continue a saved conversation (JSON), and show where it stands
/regen           answer the last question again
/new             begin a new conversation
/stats           figures of the last answer, and how full the context is
/exit            leave; so does Ctrl-D

Enter sends, Alt-Enter begins a new line. Ctrl-C stops an answer and keeps the chat.
A question that begins with a slash needs a space before it."""


class Terminal:
    """A chat in a terminal window.

    Args:
        open_backend: Loads the model on a device; None is the device of the command line.
        check_device: Raises an `OVAFMError` for a device that this machine lacks, while the model still runs.
        params: Sampling.
        system: System prompt.
    """

    def __init__(
        self,
        open_backend: Callable[[str | None], Backend],
        params: Params,
        system: str = "",
        *,
        check_device: Callable[[str], object] = devices.choose,
    ) -> None:
        from rich.console import Console

        self._open, self._params, self._check_device = open_backend, params, check_device
        self._conversation = Conversation(system=system)
        self._screen = Console(highlight=False, markup=False)
        self._device: str | None = None
        # Files of this chat's own, which /save may write again.
        self._saved: set[Path] = set()
        self._left = False
        with leave_at_once():
            self._backend = open_backend(None)

    def run(self) -> None:
        """Talk until the user leaves."""
        session = _prompt_session()
        info = self._backend.info
        self._say(f"{info.model} on {info.device}. /help shows the commands.")
        try:
            while not self._left:
                try:
                    line = session.prompt("› ")
                except KeyboardInterrupt:
                    self._say("Ctrl-D or /exit leaves")
                    continue
                except EOFError:
                    break
                self._handle(line)
        finally:
            self._backend.close()

    def _handle(self, line: str) -> None:
        text = line.strip()
        if not text:
            return
        try:
            if line.startswith("/"):
                name, _, rest = text.partition(" ")
                if name not in COMMANDS:
                    asked = "with a space before it, it is a question"
                    raise ConfigError(f"no command {name}; /help shows the commands; {asked}")
                COMMANDS[name](self, rest.strip())
            else:
                self._conversation.question(text)
                self._answer()
        except OVAFMError as error:
            self._say(str(error), "red")

    def _answer(self) -> None:
        """Answer the conversation's last question; a stopped answer is kept as far as it came."""
        last = Step()
        try:
            with _interrupt_cancels() as cancel, MarkdownStream(self._screen) as stream:
                for last in self._backend.answer(self._conversation.messages(), self._params, cancel):
                    stream.add(last.text)
        except OVAFMError:
            self._conversation.drop_question()
            raise
        figures = figures_of(last, self._backend.info)
        self._conversation.turns.append(Turn("assistant", stream.text, figures))
        self._say(figures_line(figures))

    def _say(self, text: str, style: str = "dim") -> None:
        self._screen.print(printable(text), style=style)

    def _help(self, rest: str) -> None:
        self._say(HELP, "none")

    def _system(self, rest: str) -> None:
        if rest:
            self._conversation.system = "" if rest == "-" else rest
        self._say(f"system prompt: {self._conversation.system or 'none'}")

    def _switch_device(self, rest: str) -> None:
        info = self._backend.info
        if not rest:
            self._say(f"running on {info.device}" + (f": {info.note}" if info.note else ""))
            for device in devices.available():
                self._say(f"  {device.name}: {device.full_name}")
            self._say(f"  {EMULATED}")
            return
        self._check_device(rest)
        self._backend.close()
        with leave_at_once():
            try:
                self._backend = self._open(rest)
                self._device = rest
            except OVAFMError as error:
                self._say(str(error), "red")
                self._backend = self._open(self._device)
        self._say(f"running on {self._backend.info.device}")

    def _save(self, rest: str) -> None:
        path = _path(rest, "/save")
        text = (to_markdown if path.suffix.lower() == ".md" else to_json)(self._conversation)
        try:
            if path.resolve() not in self._saved:
                check_file(path, ours=_is_conversation, what="a conversation of ov-afm chat")
            write_text(path, text)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        self._saved.add(path.resolve())
        self._say(f"saved {len(self._conversation.turns)} messages to {path}")

    def _load(self, rest: str) -> None:
        path = _path(rest, "/load")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ConfigError(f"{path} cannot be read: {reason}") from error
        self._conversation = from_json(text)
        turns = self._conversation.turns
        self._say(f"loaded {len(turns)} messages from {path}" + ("; the last of them:" if turns else ""))
        for turn in turns[-2:]:
            if turn.role == "user":
                self._say(f"› {turn.content}", "none")
                continue
            with MarkdownStream(self._screen) as stream:
                stream.add(turn.content)

    def _regenerate(self, rest: str) -> None:
        if not self._conversation.retry():
            raise ConfigError("there is no question to answer again")
        self._answer()

    def _new(self, rest: str) -> None:
        self._conversation = Conversation(system=self._conversation.system)
        self._say("a new conversation")

    def _stats(self, rest: str) -> None:
        figures = next((turn.figures for turn in reversed(self._conversation.turns) if turn.figures), None)
        if figures is None:
            self._say("no answer yet")
            return
        self._say(figures_line(figures))
        used = figures.get("prompt_tokens", 0) + figures.get("new_tokens", 0)
        self._say(context_line(used, self._backend.info.context_length))

    def _exit(self, rest: str) -> None:
        self._left = True


COMMANDS: dict[str, Callable[[Terminal, str], None]] = {
    "/help": Terminal._help,
    "/system": Terminal._system,
    "/device": Terminal._switch_device,
    "/save": Terminal._save,
    "/load": Terminal._load,
    "/regen": Terminal._regenerate,
    "/new": Terminal._new,
    "/stats": Terminal._stats,
    "/exit": Terminal._exit,
    "/quit": Terminal._exit,
}


def _is_conversation(data: bytes) -> bool:
    """Whether this is a conversation in the form of `/save FILE.json`; Markdown could be anybody's."""
    try:
        from_json(data.decode())
    except (ConfigError, UnicodeDecodeError):
        return False
    return True


def _path(rest: str, command: str) -> Path:
    if not rest:
        raise ConfigError(f"{command} needs a file name, e.g. {command} chat.json")
    return expanded(rest)


@contextmanager
def _interrupt_cancels() -> Iterator[threading.Event]:
    """While the block runs, Ctrl-C sets the event instead of raising."""
    cancel = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: cancel.set())
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, previous)


def _prompt_session() -> Any:
    """Line editing with history; Enter sends and Alt-Enter begins a new line. Pasted lines stay together."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    path = data_dir() / "history"
    if not path.exists():
        path.touch(mode=0o600)
    commands = WordCompleter([*COMMANDS], sentence=True)
    output = None if sys.stdout.isatty() else create_output(stdout=sys.stderr)
    return PromptSession(
        multiline=True,
        key_bindings=keys,
        history=FileHistory(str(path)),
        completer=commands,
        complete_while_typing=False,
        output=output,
    )


def read_question() -> str:
    """The question that standard input holds.

    Raises:
        GenerationError: The input is empty or no text.
    """
    data = sys.stdin.buffer.read()
    try:
        question = data.decode().strip("\r\n")
    except UnicodeDecodeError as error:
        raise GenerationError(
            f"the question on standard input is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}"
        ) from error
    if not question.strip():
        raise GenerationError(
            "the question on standard input is empty; pipe some text in, or run in a terminal to chat"
        )
    return question


def answer_pipe(question: str, backend: Backend, params: Params, system: str = "") -> None:
    """Answer a question, streaming the answer alone to standard output."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    conversation = Conversation(system=system)
    conversation.question(question)
    for step in backend.answer(conversation.messages(), params, threading.Event()):
        print(step.text, end="", flush=True)
        if step.dropped and step.finish_reason:
            console.note(f"note: {figures_line({'dropped': step.dropped})}")
    print(flush=True)
