"""Bodies of requests are refused by their size before they are parsed."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luban.serve.api.errors import error_body

LEAST = 2 * 2**20  # bytes
BYTES_A_TOKEN = 32  # of the model's context; token ids in JSON take about 7, text about 5


def body_limit(context: int) -> int:
    """Bytes that a body may have, for a model of this context."""
    return LEAST + BYTES_A_TOKEN * context


class BodyLimit:
    """Answers 413 to a body above `limit()` bytes: at once where its length is declared, else as soon as more has come."""

    def __init__(self, app: ASGIApp, limit: Callable[[], int]):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit = self.limit()
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            answer = JSONResponse(error_body(_problem(limit)), 413, {"Connection": "close"})
            return await answer(scope, receive, send)
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > limit:
                raise HTTPException(413, _problem(limit), {"Connection": "close"})
            return message

        return await self.app(scope, counted, send)


def _problem(limit: int) -> str:
    return f"the request's body is larger than this server reads ({limit} bytes)"
