"""Every error in one form: OpenAI's envelope, without paths, tracebacks or addresses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import ConfigError, DeviceError, GenerationError
from .engine import EngineBusy, EngineLost, EngineTimeout, Refusal
from .protocol import ErrorBody, ErrorEnvelope

__all__ = ["WireError", "as_wire_error", "install"]

logger = logging.getLogger(__name__)
RETRY_AFTER_S = 2
LONGEST_VALUE = 60


class WireError(Exception):
    """An error as the client sees it.

    Args:
        status: HTTP status.
        message: One line: what was wrong, the value found, what to do.
        param: The request's field that is to blame.
        code: OpenAI's word for the reason.
        headers: More headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    @property
    def envelope(self) -> dict[str, Any]:
        """The body."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        body = ErrorBody(message=str(self), type=kind, param=self.param, code=self.code)
        return ErrorEnvelope(error=body).model_dump()

    def response(self) -> JSONResponse:
        """The answer to send."""
        return JSONResponse(self.envelope, self.status, self.headers)


def as_wire_error(error: Exception) -> WireError:
    """How the client sees an error of the engine; what is none of ours becomes a plain 500."""
    if isinstance(error, WireError):
        return error
    message = " ".join(str(error).split())
    if isinstance(error, Refusal):
        return WireError(400, message, param=error.param, code=error.code)
    retry = {"Retry-After": str(RETRY_AFTER_S)}
    if isinstance(error, EngineBusy):
        return WireError(429, message, code="queue_full", headers=retry)
    if isinstance(error, EngineLost):
        return WireError(503, message, code="engine_unavailable", headers=retry)
    if isinstance(error, EngineTimeout):
        return WireError(504, message, code="timeout")
    if isinstance(error, DeviceError):
        # Its text names folders of this machine.
        logger.error("%s", message)
        return WireError(503, "the model cannot be loaded; the server's log says why", code="engine_unavailable")
    if isinstance(error, (ConfigError, GenerationError)):
        return WireError(400, message)
    logger.error("a request failed", exc_info=error)
    return WireError(500, "the server failed on this request; its log says why", code="internal_error")


def install(app: FastAPI) -> None:
    """Make an application answer every error in the envelope."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        return as_wire_error(error).response()

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        messages = {
            404: "no such route; see /docs",
            405: f"this route does not take {request.method if request.method.isalpha() else 'that method'}",
        }
        message = messages.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return WireError(error.status_code, message, code=code, headers=error.headers).response()

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return invalid_request(error.errors()).response()

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    for kind in (WireError, GenerationError, ConfigError, DeviceError, Exception):
        app.add_exception_handler(kind, known)


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> WireError:
    """The first thing that is wrong with a body, in a line."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(part for part in place if part.isidentifier() or part.isdigit()) or None
    found = first.get("input")
    value = "" if found is None or isinstance(found, (dict, list)) else f", found {_short(found)}"
    message = f"{param or 'body'}: {first['msg'][:1].lower()}{first['msg'][1:]}{value}"
    return WireError(400, message, param=param, code="invalid_value")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "…"
