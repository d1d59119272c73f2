"""Errors of the API: what a request is refused with, all in OpenAI's shape."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from luban.core.errors import LubanError
from luban.generate.cache import PromptTooLong
from luban.serve.memory import RequestTooLarge
from luban.serve.worker import GenerationError
from luban.tokenizer.tokenizer import without_surrogates

TRIED = re.compile(r"(str|int|float|bool|list\[.*|dict\[.*)$")  # types in the places of validation errors
UNREAD = "There was an error parsing the body"  # as FastAPI says it
RETRY_AFTER = {"Retry-After": "2"}  # seconds


class UnknownModel(LubanError):
    """A model that isn't served here."""


class Stopping(LubanError):
    """The server is being stopped."""


class Busy(LubanError):
    """More requests wait than the server lets wait."""


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape; what a request spelled may hold lone surrogates, which no response can."""
    message, param = without_surrogates(message), param and without_surrogates(param)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _field(place: Sequence[str | int]) -> str:
    """The field that a validation error is about: its place in the body, without the names of the types that were tried."""
    named = itertools.takewhile(lambda part: not (isinstance(part, str) and TRIED.match(part)), place[1:])
    return ".".join(map(str, named))


def _invalid(error: RequestValidationError) -> JSONResponse:
    """A body that isn't JSON, or a field of another type or range than it may have."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        where = f"{first.get('ctx', {}).get('error', 'not understood')} at character {first['loc'][-1]}"
        return JSONResponse(error_body(f"the request's body is not valid JSON: {where}"), 400)
    where = _field(first["loc"])
    if not where and first["type"] in ("model_attributes_type", "dict_type", "model_type", "missing"):
        return JSONResponse(error_body("the request's body must be a JSON object, sent as application/json"), 400)
    said = dict.fromkeys(
        str(each["msg"]).removeprefix("Value error, ") for each in error.errors() if _field(each["loc"]) == where
    )
    message = ", or ".join(said)  # one for each form that a field may have
    return JSONResponse(error_body(f"{where}: {message}" if where else message, param=where or None), 400)


def _unread(error: HTTPException) -> str:
    """Why a body isn't JSON, where its parser failed otherwise than on the grammar."""
    reason = "it is not in UTF-8" if isinstance(error.__cause__, UnicodeDecodeError) else "it is nested too deeply"
    return f"the request's body can't be read as JSON: {reason}"


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error in OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return _invalid(error)

    @app.exception_handler(HTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> JSONResponse:
        message = f"no route {http.method} {http.url.path}" if error.status_code in (404, 405) else str(error.detail)
        if message == UNREAD:
            message = _unread(error)
        return JSONResponse(error_body(message), error.status_code, error.headers)

    @app.exception_handler(UnknownModel)
    async def unknown(_: HttpRequest, error: UnknownModel) -> JSONResponse:
        return JSONResponse(error_body(str(error), param="model", code="model_not_found"), 404)

    @app.exception_handler(Busy)
    async def busy(_: HttpRequest, error: Busy) -> JSONResponse:
        return JSONResponse(error_body(str(error), kind="rate_limit_error", code="queue_full"), 429, RETRY_AFTER)

    @app.exception_handler(Stopping)
    async def stopping(_: HttpRequest, error: Stopping) -> JSONResponse:
        return JSONResponse(error_body(str(error), kind="server_error"), 503, RETRY_AFTER)

    @app.exception_handler(GenerationError)
    async def failed(_: HttpRequest, error: GenerationError) -> JSONResponse:
        return JSONResponse(error_body(str(error), kind="server_error"), 500)

    @app.exception_handler(Exception)
    async def broken(_: HttpRequest, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(f"the server failed: {type(error).__name__}", kind="server_error"), 500)

    @app.exception_handler(PromptTooLong)
    @app.exception_handler(RequestTooLarge)
    async def too_long(_: HttpRequest, error: LubanError) -> JSONResponse:
        return JSONResponse(error_body(str(error), code="context_length_exceeded"), 422)

    @app.exception_handler(LubanError)
    async def wrong(_: HttpRequest, error: LubanError) -> JSONResponse:
        return JSONResponse(error_body(str(error)), 400)
