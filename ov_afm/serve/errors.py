"""Every error in the form of the API that was called, without paths, tracebacks or addresses.

The engine's process raises `APIError` too and does not need FastAPI, so FastAPI is imported only where it is used.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DeviceError, EngineLost, GenerationError, OVAFMError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

__all__ = ["APIError", "EngineBusy", "EngineTimeout", "as_api_error", "first_mistake", "install"]

logger = logging.getLogger(__name__)
RETRY = {"Retry-After": "2"}
LONGEST_VALUE = 60
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
ANTHROPIC_TYPES = TYPES | {
    408: "timeout_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
}


class APIError(OVAFMError):
    """An error as the client sees it.

    Args:
        message: One line: what was wrong, the value found, what to do.
        param: The request's field that is to blame.
        code: OpenAI's code for the reason.
        status: HTTP status.
        headers: More headers.
    """

    default_code = "request-refused"

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        *,
        status: int = 400,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.param, self.api_code, self.status, self.headers = param, code, status, dict(headers or {})

    @property
    def envelope(self) -> dict[str, Any]:
        """The body in OpenAI's form; `protocol.ErrorEnvelope` describes it."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.api_code}}

    def body(self, path: str) -> dict[str, Any]:
        """The body in the form of the API that has this path."""
        return next((form for prefix, form in FORMS.items() if f"{path}/".startswith(prefix)), _openai)(self)

    def response(self, path: str) -> JSONResponse:
        """The answer to send to a request for this path."""
        from fastapi.responses import JSONResponse

        body = self.body(path)
        request_id = {"request-id": body["request_id"]} if "request_id" in body else {}
        return JSONResponse(body, self.status, self.headers | request_id)


def _openai(error: APIError) -> dict[str, Any]:
    return error.envelope


def _anthropic(error: APIError) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    error_body = {"type": kind, "message": str(error)}
    return {"type": "error", "error": error_body, "request_id": f"req_{secrets.token_hex(12)}"}


def _ollama(error: APIError) -> dict[str, Any]:
    return {"error": str(error)}


# The form of errors, by the beginning of a path. All others have OpenAI's, and so has a wrong base URL of its API.
FORMS: dict[str, Callable[[APIError], dict[str, Any]]] = {
    "/v1/messages/": _anthropic,
    "/api/v1/": _openai,
    "/api/": _ollama,
}


class EngineBusy(GenerationError):
    """The queue is full."""

    default_code = "queue-full"


class EngineTimeout(GenerationError):
    """The request took longer than a request may."""

    default_code = "request-timeout"


def as_api_error(error: Exception) -> APIError:
    """How the client sees an error; a bug becomes a plain 500."""
    if isinstance(error, APIError):
        return error
    message = " ".join(str(error).split())
    if isinstance(error, EngineBusy):
        return APIError(message, code="queue_full", status=429, headers=RETRY)
    if isinstance(error, EngineLost):
        return APIError(message, code="engine_unavailable", status=503, headers=RETRY)
    if isinstance(error, EngineTimeout):
        return APIError(message, code="timeout", status=504)
    if isinstance(error, DeviceError):
        # Its text names folders of this machine.
        logger.error("%s", message)
        return APIError("the model cannot be loaded; the server's log says why", code="engine_unavailable", status=503)
    if isinstance(error, (ConfigError, GenerationError)):
        return APIError(message)
    logger.error("a request failed", exc_info=error)
    return APIError("the server failed on this request; its log says why", code="internal_error", status=500)


def install(app: FastAPI) -> None:
    """Make an application answer every error in the envelope."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response(request.scope["path"])

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        messages = {
            404: "no such route; see /docs",
            405: f"this route does not take {request.method if request.method.isalpha() else 'that method'}",
        }
        message = messages.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        refusal = APIError(message, code=code, status=error.status_code, headers=error.headers)
        return refusal.response(request.scope["path"])

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return first_mistake(error.errors()).response(request.scope["path"])

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    for kind in (OVAFMError, Exception):
        app.add_exception_handler(kind, ours)


def first_mistake(mistakes: Sequence[Mapping[str, Any]], place: str = "") -> APIError:
    """The first thing that is wrong with a body, or with the part of it at `place`, in a line."""
    first = mistakes[0]
    steps = [*place.split("."), *(str(step) for step in first["loc"] if step != "body")]
    param = ".".join(step for step in steps if step.isidentifier() or step.isdigit()) or None
    if first["type"] == "extra_forbidden":
        return APIError(f"{param}: this field is not known here; leave it out", param, "unknown_parameter")
    actual = first.get("input")
    value = "" if actual is None or isinstance(actual, (dict, list)) else f", found {_short(actual)}"
    message = f"{param or 'body'}: {first['msg'][:1].lower()}{first['msg'][1:]}{value}"
    return APIError(message, param, "invalid_value")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "…"
