"""The routes as a whole: which methods a path takes, and which path was meant by one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from .errors import APIError

__all__ = ["RouteTable"]

# Parts of a path that base URLs have once too often or not at all.
PREFIXES = frozenset({"", "v1", "v2", "v1beta", "api", "openai", "openai-compatible"})
ALWAYS = frozenset({"OPTIONS"})
LONGEST_SHOWN = 80
ALIKE = 0.8


class RouteTable:
    """What an application answers.

    Args:
        routes: Its routes.

    Attributes:
        paths: The routes' paths, as they were declared.
        takes_json: Paths whose POST has a JSON object as its body.
    """

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes = [route for route in routes if isinstance(route, Route)]
        self.paths = frozenset(route.path for route in self._routes)
        self.takes_json = frozenset(
            route.path for route in self._routes if getattr(route, "body_field", None) is not None
        )
        self._known = [path for path in dict.fromkeys(route.path for route in self._routes) if "{" not in path]

    def methods(self, scope: Scope) -> list[str]:
        """The methods that a request's path takes, in order; `*` takes what any takes.

        Raises:
            APIError: There is no such path (404).
        """
        path = scope["path"]
        every = path == "*"
        if path.endswith("/") and path != "/":
            # A route with a name at its end would take it for an empty name.
            raise self._missing(path)
        matching = [route for route in self._routes if every or route.matches(scope)[0] != Match.NONE]
        taken = frozenset().union(*(route.methods or () for route in matching))
        if not taken:
            raise self._missing(path)
        return sorted(taken | ALWAYS | ({"HEAD"} if "GET" in taken else frozenset()))

    def check_method(self, scope: Scope, methods: list[str]) -> None:
        """Refuse a method that a path does not take.

        Raises:
            APIError: With status 405, which names those that it takes.
        """
        method = scope["method"]
        if method not in methods:
            names = " and ".join(each for each in methods if each not in ("HEAD", "OPTIONS"))
            shown = method if method.isalpha() and len(method) <= LONGEST_SHOWN else "that method"
            message = f"{scope['path'][:LONGEST_SHOWN]} takes {names}, not {shown}"
            allow = {"Allow": ", ".join(methods)}
            raise APIError(message, code="method_not_allowed", status=405, headers=allow)

    def _missing(self, path: str) -> APIError:
        shown, meant = path[:LONGEST_SHOWN], self.meant(path)
        if meant is None:
            message = f"no such route: {shown}; see /docs"
        elif meant.startswith("/v1/"):
            message = f"no such route: {shown}; it is {meant}, and the base URL of this server ends in /v1"
        else:
            message = f"no such route: {shown}; it is {meant}"
        return APIError(message, code="not_found", status=404)

    def meant(self, path: str) -> str | None:
        """The route that a wrong path is most likely to mean; None if there is none like it."""
        path = "/" + "/".join(part for part in path.lower().split("/") if part)
        if path in ("/", "/v1"):
            return "/v1/models"
        words = _words(path)
        rules = (
            lambda known: known == path,
            lambda known: path.endswith(known) and known != "/",
            lambda known: known.endswith(path),
            lambda known: known.startswith(path),
            lambda known: words and _words(known) == words,
            lambda known: words and _words(known)[: len(words)] == words,
            lambda known: _words(known) and words[-len(_words(known)) :] == _words(known),
        )
        for rule in rules:
            if fitting := [known for known in self._known if rule(known)]:
                return min(fitting, key=len) if rule is rules[2] else fitting[0]
        alike = difflib.get_close_matches(path, self._known, 1, ALIKE)
        return alike[0] if alike else None


def _words(path: str) -> list[str]:
    """A path's parts without those that base URLs differ in."""
    return [part for part in path.split("/") if part not in PREFIXES]
