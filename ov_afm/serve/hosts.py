"""Who may ask a server that asks for no key: nobody through a web page that somebody else wrote.

A page of any site can make a browser send requests to this machine. Two headers, which pages cannot forge, tell them
apart. `Host` is the name that the page's author used: one who lets a name of their own point to this machine (DNS
rebinding) would otherwise read the answers. `Origin` is the page's own address.

On a loopback address only names of this machine are allowed. Where the network may ask, so are addresses, names without
a dot, and names that no public DNS gives out: rebinding needs a name that its author owns.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from .errors import APIError

__all__ = ["LOCALHOST", "HostRules", "is_loopback", "read_host"]

Headers = Sequence[tuple[bytes, bytes]]

HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.%]+\]|[A-Za-z0-9._-]*)(?::[0-9]{0,5})?")
LOCALHOST = "localhost"
# Top-level names for local use: RFC 6761, RFC 6762, RFC 8375 (home.arpa), ICANN's .internal; Kubernetes' .svc; .lan.
LOCAL_NAMES = ("localhost", "local", "internal", "home.arpa", "svc", "lan")
# Pages that come with a program on this machine and not from a site.
LOCAL_SCHEMES = ("app", "file", "tauri", "vscode-file", "vscode-webview")
LONGEST_SHOWN = 80


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, and no other machine reaches it."""
    if host == LOCALHOST or host.endswith(f".{LOCALHOST}"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_host(headers: Headers) -> str | None:
    """The name in the header `Host`, in small letters and without port, dot at the end or brackets; None without one.

    Raises:
        APIError: The header is no host, or there are two.
    """
    hosts = [value.decode("latin-1").strip() for name, value in headers if name == b"host"]
    if not hosts:
        return None
    match = HOST.fullmatch(hosts[0])
    if len(hosts) > 1 or match is None:
        raise APIError(f"the header Host is no host: {', '.join(hosts)[:LONGEST_SHOWN]!r}", code="invalid_host")
    return match["name"].strip("[]").rstrip(".").lower() or None


@dataclass(frozen=True, slots=True)
class HostRules:
    """Hosts and origins from which requests are taken.

    Attributes:
        local_only: The server listens on loopback addresses alone.
        hosts: More names that `Host` may have; `*` allows all.
        origins: Web origins that may call; `*` allows all.
    """

    local_only: bool = True
    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def check(self, headers: Headers) -> None:
        """Refuse a request that a foreign web page may have sent.

        Raises:
            APIError: With status 403.
        """
        host = read_host(headers)
        # Browsers always send one.
        if host is not None and not self._allows_host(host):
            raise APIError(
                f"the host {host[:LONGEST_SHOWN]!r} is not allowed here, because no API key is asked for; "
                f"start the server with --allowed-host {host[:LONGEST_SHOWN]}, or with --api-key",
                code="host_not_allowed",
                status=403,
            )
        for name, value in headers:
            if name == b"origin" and not self._allows_origin(origin := value.decode("latin-1"), host):
                raise APIError(
                    f"pages of {origin[:LONGEST_SHOWN]!r} may not ask here; "
                    f"start the server with --cors-origin {origin[:LONGEST_SHOWN]}",
                    code="origin_not_allowed",
                    status=403,
                )

    def _allows_host(self, host: str) -> bool:
        if "*" in self.hosts or host in self.hosts or is_loopback(host):
            return True
        if self.local_only:
            return False
        return _is_address(host) or "." not in host or host.endswith(tuple(f".{name}" for name in LOCAL_NAMES))

    def _allows_origin(self, origin: str, host: str | None) -> bool:
        if "*" in self.origins or origin in self.origins:
            return True
        try:
            parts = urlsplit(origin)
            name = (parts.hostname or "").rstrip(".")
        except ValueError:
            return False
        # `Host` was allowed: a page of the same host comes from this server, or from a neighbour on the same machine.
        return parts.scheme in LOCAL_SCHEMES or (
            parts.scheme in ("http", "https") and bool(name) and (is_loopback(name) or name == host)
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
