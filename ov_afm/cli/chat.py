"""`ov-afm chat`: talk with a model, in the terminal or in a browser.

    ov-afm chat models/afm-int4
    ov-afm chat --ui models/afm-int4
    ov-afm chat --url http://127.0.0.1:8000/v1

With a question on standard input instead of a terminal, it prints the answer and nothing else:
`echo question | ov-afm chat DIR`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..chat.backend import Backend, Local
from ..errors import ConfigError
from ..runtime import devices
from ..runtime.sampling import Params
from ..system.interrupt import leave_at_once
from ..system.resources import require
from .command import command, command_parser
from .options import add_load_options, add_sampling_options, load, pipeline_options, sampling

if TYPE_CHECKING:
    from ..chat.remote import Remote

__all__ = ["main"]

KEY_VARIABLE = "OV_AFM_API_KEY"


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("chat", "Talk with a model, in the terminal or in a browser (--ui).")
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    several = "model directory; with --ui also several, or folders of them"
    add("models", nargs="*", default=[], metavar="MODEL_DIR", help=several)
    add("--url", help="talk to an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1")
    add("--api-key", metavar="KEY", help=f"key of that server; also from {KEY_VARIABLE}")
    add("--model", metavar="NAME", help="model of that server; its first one if not given")
    add("--system", default="", metavar="TEXT", help="system prompt")
    add = partial(parser.add_argument_group("browser").add_argument, default=argparse.SUPPRESS)
    add("--ui", action="store_true", default=False, help="open the chat in a browser instead of the terminal")
    add("--host", metavar="ADDRESS", help="address to listen on; other than 127.0.0.1 needs --auth")
    add("--port", type=int, default=7860, help="port to listen on; 0 takes a free one")
    add("--auth", metavar="USER:PASSWORD", help="ask for this name and password")
    add("--share", action="store_true", default=False, help="public link through gradio's relay; needs --auth")
    add("--no-browser", action="store_true", default=False, help="do not open a browser window")
    add_sampling_options(parser)
    add_load_options(parser)
    return parser


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    given = vars(arguments)
    if bool(arguments.models) == ("url" in given):
        parser.error("give a model directory, or --url of a server")
    if arguments.ui:
        return
    for flag in ("host", "auth"):
        if flag in given:
            parser.error(f"--{flag} needs --ui")
    if arguments.share:
        parser.error("--share needs --ui")
    if len(arguments.models) > 1:
        parser.error(f"one model directory at a time, found {len(arguments.models)}; several need --ui")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check(arguments, parser)
    params = sampling(arguments)
    if arguments.ui:
        _in_browser(arguments, params, pipeline_options(arguments, parser))
        return 0

    def check_device(device: str) -> None:
        if "url" in arguments:
            raise ConfigError("the server chooses the device; /device works with a model directory only")
        devices.choose(device)

    def open_backend(device: str | None) -> Backend:
        if "url" in arguments:
            return _remote(arguments)
        chosen = argparse.Namespace(**{**vars(arguments), "device": device or arguments.device})
        return Local(load(arguments.models[0], chosen, parser))

    if sys.stdin.isatty():
        from ..chat.terminal import Terminal

        require("chat", "prompt_toolkit")
        Terminal(open_backend, params, arguments.system, check_device=check_device).run()
    else:
        _in_pipe(open_backend, params, arguments.system)
    return 0


def _in_browser(arguments: argparse.Namespace, params: Params, options: Mapping[str, Any]) -> None:
    from ..chat.web.app import LOCAL_HOST, Address, serve

    given = vars(arguments)
    serve(
        arguments.models,
        params,
        Address(
            given.get("host", LOCAL_HOST),
            arguments.port,
            given.get("auth"),
            share=arguments.share,
            open_browser=not arguments.no_browser,
        ),
        device=arguments.device,
        system=arguments.system,
        options=options,
        remote=_remote(arguments) if "url" in given else None,
    )


def _in_pipe(open_backend: Callable[[str | None], Backend], params: Params, system: str) -> None:
    from ..chat.terminal import answer_pipe, read_question

    with leave_at_once():
        question = read_question()
        backend = open_backend(None)
        try:
            answer_pipe(question, backend, params, system)
        finally:
            backend.close()


def _remote(arguments: argparse.Namespace) -> Remote:
    from ..chat.remote import Remote

    given = vars(arguments)
    key = given.get("api_key", os.environ.get(KEY_VARIABLE))
    return Remote(arguments.url, given.get("model"), key)
