"""The browser chat as a program: what it listens on, whom it lets in, and how it ends."""

from __future__ import annotations

import argparse
import inspect
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...errors import ConfigError
from ...runtime.sampling import Params
from ...system import console
from ...system.resources import require
from ..models import Host, find_models
from ..remote import Remote
from ..session import Talk
from ..store import Store, data_dir
from ..strings import TEXTS
from .security import Guard

__all__ = ["serve"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
FILE_NAME = "chat.sqlite"
LARGEST_BODY = "1mb"
QUEUE_POLL_S = 0.02


def serve(
    arguments: argparse.Namespace, params: Params, options: Mapping[str, Any], remote: Remote | None = None
) -> int:
    """Serve the page until Ctrl-C; returns the exit status.

    Args:
        arguments: The command line of `ov-afm chat --ui`.
        params: Sampling.
        options: How models are loaded: arguments of `Pipeline`.
        remote: A server to talk to instead of a model.

    Raises:
        OVAFMError: The page cannot be served so.
    """
    require("chat", "gradio")
    host = vars(arguments).get("host", "127.0.0.1")
    auth = _auth(arguments, open_=arguments.share or host not in LOOPBACK)
    port = _free_port(host, arguments.port)
    models = [] if remote else find_models(arguments.models)
    store = Store(data_dir() / FILE_NAME)
    runner = Host(models, arguments.device, options, remote)
    try:
        _launch(Talk(runner, store), params, arguments, host, port, auth)
    finally:
        runner.close()
        store.close()
    return 0


def _auth(arguments: argparse.Namespace, *, open_: bool) -> tuple[str, str] | None:
    given = vars(arguments).get("auth")
    if given is None:
        if open_:
            raise ConfigError("--share and --host open the chat to others; give --auth USER:PASSWORD too")
        return None
    user, colon, password = given.partition(":")
    if not (user and colon and password):
        raise ConfigError("--auth takes USER:PASSWORD")
    return user, password


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0; refused here because Gradio would try the next hundred."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            return int(listener.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host} port {port}: {getattr(error, 'strerror', None) or error}; choose another --port"
        ) from error


@contextmanager
def _no_stubs() -> Iterator[None]:
    """Keep Gradio from writing type stubs into its own folder, which is half the time that importing it takes.

    It leaves out classes that lie in no file.
    """
    getfile = inspect.getfile

    def nowhere(found: Any) -> str:
        if isinstance(found, type) and found.__module__.startswith("gradio."):
            raise OSError
        return getfile(found)

    inspect.getfile = nowhere  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getfile = getfile


def _launch(
    talk: Talk, params: Params, arguments: argparse.Namespace, host: str, port: int, auth: tuple[str, str] | None
) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with _no_stubs():
        import gradio as gr
    from starlette.middleware import Middleware

    from . import html, page

    blocks = page.build(talk, params, arguments.system)
    # Sans-serif of the system: Gradio's themes fetch their fonts from elsewhere.
    font = ("system-ui", "Segoe UI", "DejaVu Sans", "sans-serif")
    mono = ("ui-monospace", "Consolas", "DejaVu Sans Mono", "monospace")
    # Gradio's own light colours have less contrast than people need (WCAG: 4.5).
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=font, font_mono=mono).set(
        body_text_color_subdued="*neutral_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_cancel_background_fill="#b91c1c",
        button_cancel_background_fill_hover="#991b1b",
    )
    # Gradio's queue looks for work every millisecond, which costs 9% of a core for nothing (docs/LOG.md).
    blocks._queue.sleep_when_free = QUEUE_POLL_S
    closed = not arguments.share and host in LOOPBACK
    blocks.launch(
        server_name=host,
        server_port=port,
        share=arguments.share,
        auth=auth,
        inbrowser=not arguments.no_browser,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        max_file_size=LARGEST_BODY,
        footer_links=[],
        app_kwargs={"middleware": [Middleware(Guard, loopback=closed)], "docs_url": None, "redoc_url": None},
        theme=theme,
        css=html.CSS,
        show_error=True,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    shown = f"[{host}]" if ":" in host else host
    console.note(TEXTS.address.format(url=f"http://{shown}:{port}"))
    if blocks.share_url:
        console.note(TEXTS.shared.format(url=blocks.share_url))
    try:
        blocks.block_thread()
    finally:
        blocks.close(verbose=False)
