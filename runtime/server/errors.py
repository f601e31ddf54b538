"""Errors as OpenAI's clients read them: `{"error": {message, type, param, code}}` and a status."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ...ir.errors import CapacityError, InfcError, RequestError
from ..memory_reserve import RESERVE

_LOG = logging.getLogger("infc.server")
_MAX_MESSAGE = 500  # characters: an error never sends a request back to whoever made it

_Handler = Callable[[Request, Exception], Awaitable[Response]]


class ApiError(Exception):
    """A refusal with its HTTP status; `param` names the field of the request."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        self.status = status
        self.message = _shorten(message)
        self.param = param
        self.code = code
        self.retry_seconds = retry_seconds
        super().__init__(message)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that the client gets, alone or as an event of a stream."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self) -> JSONResponse:
        """The answer of a request that ends with this error."""
        headers = {}
        if self.retry_seconds is not None:
            headers["Retry-After"] = str(self.retry_seconds)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (408, 413):
            headers["Connection"] = "close"  # the rest of the body is not worth reading
        return JSONResponse(self.body, self.status, headers)


def as_api_error(error: Exception) -> ApiError:
    """What a client may know of an error: its own mistakes in full, ours not at all."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error), param=error.field)
    if isinstance(error, CapacityError):
        return ApiError(503, str(error), code="shutting_down", retry_seconds=5)
    if isinstance(error, InfcError):
        _LOG.error("a request failed: %s", error)
        return ApiError(503, "the engine has stopped", code="engine_stopped")
    if isinstance(error, MemoryError):
        RESERVE.free()
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, "internal server error; see the log of the server", code="internal_error")


def install_handlers(app: FastAPI) -> None:
    """Gives every error of the app the one shape, those of unknown routes included."""
    for kind in (ApiError, InfcError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(HTTPException, _answer_http)
    # Any other reaches `RequestLog`, which answers it.


async def _answer(request: Request, error: Exception) -> Response:
    return _noted(request, as_api_error(error)).response()


def _noted(request: Request, error: ApiError) -> ApiError:
    """The error, kept for the request's line in the log."""
    if record := request.scope.get("infc.record"):
        record.error = error
    return error


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        text = f"no route {request.method} {request.url.path:.200}"
        if request.url.path == "/":
            text += ": the API is at /v1, its description at /docs"
        return _noted(request, ApiError(404, text, code="unknown_route")).response()
    refusal = ApiError(error.status_code, f"{error.detail}: {request.method}")
    response = _noted(request, refusal).response()
    response.headers.update(error.headers or {})
    return response


def _shorten(text: str) -> str:
    printable = "".join(c if c.isprintable() else " " for c in text[: _MAX_MESSAGE + 1])
    return printable if len(printable) <= _MAX_MESSAGE else printable[: _MAX_MESSAGE - 1] + "…"
