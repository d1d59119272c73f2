"""While the model is loaded, nothing but the health check and the page answers."""

from __future__ import annotations

from typing import Protocol

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from luban.serve.api.errors import RETRY_AFTER, error_body


class Loads(Protocol):
    """What may still be loading."""

    @property
    def ready(self) -> bool:
        """Whether it has been loaded."""
        ...


class OpenWhenReady:
    """Answers 503 to everything but `free` until the service is ready."""

    def __init__(self, app: ASGIApp, service: Loads, free: frozenset[str]):
        self.app, self.service, self.free = app, service, free

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.service.ready or scope["type"] != "http" or scope["path"] in self.free:
            return await self.app(scope, receive, send)
        body = error_body("the model is still being loaded", kind="server_error", code="loading")
        await JSONResponse(body, 503, RETRY_AFTER)(scope, receive, send)
