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
from .gradio_patches import SILENCE_ABORTS, no_stubs, poll_less
from .security import SecurityMiddleware

__all__ = ["LOCAL_HOST", "Address", "serve"]

LOCAL_HOST = "127.0.0.1"
LOOPBACK = (LOCAL_HOST, "localhost", "::1")


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
    store = Store(data_dir() / "chat.sqlite")
    models = ModelManager(found, device, options, remote)
    try:
        _run(_page(Session(models, store), params, system), address, port, credentials)
    finally:
        models.close()
        store.close()


def _page(session: Session, params: Params, system: str) -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with no_stubs():
        from . import page
    blocks = page.build(session, params, system)
    poll_less(blocks)
    return blocks


def _run(blocks: Any, address: Address, port: int, credentials: tuple[str, str] | None) -> None:
    from starlette.middleware import Middleware

    from . import conversation_view, html, page

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
        max_file_size="1mb",
        footer_links=[],
        app_kwargs={"middleware": [middleware], "docs_url": None, "redoc_url": None},
        theme=page.THEME,
        css=html.CSS + conversation_view.CSS,
        js=SILENCE_ABORTS,
        show_error=True,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    host = f"[{address.host}]" if ":" in address.host else address.host
    console.note(f"chat on http://{host}:{port} (Ctrl-C ends it)")
    if blocks.share_url:
        console.note(f"shared at {blocks.share_url}")
    try:
        blocks.block_thread()
    finally:
        blocks.close(verbose=False)
