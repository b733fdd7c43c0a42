"""The browser chat as a program: what it listens on, whom it lets in, and how it ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import ConfigError
from ...runtime.sampling import Params
from ...system import console
from ...system.resources import require
from ..models import ModelManager, find_models
from ..remote import Remote
from ..session import Session
from ..store import Store, data_dir
from ..strings import STRINGS
from .gradio_patches import SILENCE_ABORTS, no_stubs, poll_less
from .security import SecurityMiddleware

__all__ = ["LOCAL_HOST", "Address", "serve"]

LOCAL_HOST = "127.0.0.1"
LOOPBACK = (LOCAL_HOST, "localhost", "::1")
FILE_NAME = "chat.sqlite"
LARGEST_BODY = "1mb"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the page is served, and for whom.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        auth: `USER:PASSWORD` to ask for; needed where others can reach the page.
        share: Make a public link through Gradio's relay.
        open_browser: Open a browser window.
    """

    host: str = LOCAL_HOST
    port: int = 7860
    auth: str | None = None
    share: bool = False
    open_browser: bool = True

    @property
    def local(self) -> bool:
        """Whether only this machine can reach the page."""
        return not self.share and self.host in LOOPBACK

    def credentials(self) -> tuple[str, str] | None:
        """Name and password.

        Raises:
            ConfigError: There are none although others can reach the page, or they have another form.
        """
        if self.auth is None:
            if not self.local:
                raise ConfigError(
                    "--share and --host open the chat to others; give --auth USER:PASSWORD too", code="auth-missing"
                )
            return None
        user, _, password = self.auth.partition(":")
        if not (user and password):
            raise ConfigError("--auth takes USER:PASSWORD", code="auth-invalid")
        return user, password

    def free_port(self) -> int:
        """The port, or a free one for 0.

        Raises:
            ConfigError: It is taken; Gradio would try the next hundred.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            with socket.create_server((self.host, self.port), family=family) as listener:
                return int(listener.getsockname()[1])
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"cannot listen on {self.host} port {self.port}: {reason}; choose another --port", code="port-taken"
            ) from error


def serve(
    model_paths: Sequence[str],
    params: Params,
    address: Address,
    *,
    device: str = "CPU",
    system: str = "",
    options: Mapping[str, Any] | None = None,
    remote: Remote | None = None,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        model_paths: Model directories, or folders of them; empty with `remote`.
        params: Sampling.
        address: Where to serve the page.
        device: The first device.
        system: System prompt of a new conversation.
        options: How models are loaded: arguments of `Pipeline`.
        remote: A server to talk to instead of a model.

    Raises:
        OVAFMError: The page cannot be served so.
    """
    require("chat", "gradio")
    credentials, port = address.credentials(), address.free_port()
    found = [] if remote else find_models(model_paths)
    store = Store(data_dir() / FILE_NAME)
    models = ModelManager(found, device, options, remote)
    try:
        _launch(Session(models, store), params, system, address, port, credentials)
    finally:
        models.close()
        store.close()


def _launch(
    session: Session,
    params: Params,
    system: str,
    address: Address,
    port: int,
    credentials: tuple[str, str] | None,
) -> None:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with no_stubs():
        import gradio as gr
    from starlette.middleware import Middleware

    from . import html, page

    blocks = page.build(session, params, system)
    poll_less(blocks)
    # Sans-serif of the system: Gradio's themes fetch their fonts from other sites.
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
    middleware = Middleware(SecurityMiddleware, loopback=address.local)
    blocks.launch(
        server_name=address.host,
        server_port=port,
        share=address.share,
        auth=credentials,
        inbrowser=address.open_browser,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        max_file_size=LARGEST_BODY,
        footer_links=[],
        app_kwargs={"middleware": [middleware], "docs_url": None, "redoc_url": None},
        theme=theme,
        css=html.CSS,
        js=SILENCE_ABORTS,
        show_error=True,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    host = f"[{address.host}]" if ":" in address.host else address.host
    console.note(STRINGS.address.format(url=f"http://{host}:{port}"))
    if blocks.share_url:
        console.note(STRINGS.shared.format(url=blocks.share_url))
    try:
        blocks.block_thread()
    finally:
        blocks.close(verbose=False)
