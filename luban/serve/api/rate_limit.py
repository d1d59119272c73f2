"""At most so many requests a minute from one client."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from luban.serve.api.errors import error_body

MAX_CLIENTS = 10_000  # that are remembered; the longest silent is forgotten first


class RateLimit:
    """Answers 429 with Retry-After to POST requests beyond a token bucket of `per_minute`, which fills evenly. A client is
    known by the key that it sends, or by its address without one.

    Args:
        per_minute: requests, and as many at once.
        clock: seconds, rising.
    """

    def __init__(self, app: ASGIApp, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self.app, self.per_minute, self.clock = app, per_minute, clock
        self.left: OrderedDict[bytes, tuple[float, float]] = OrderedDict()  # client → requests left, when that was so

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        wait = self._take(_client(scope))
        if wait == 0:
            return await self.app(scope, receive, send)
        problem = f"more than {self.per_minute} requests a minute: try again in {math.ceil(wait)} s"
        body = error_body(problem, kind="rate_limit_error", code="rate_limit_exceeded")
        await JSONResponse(body, 429, {"Retry-After": str(math.ceil(wait))})(scope, receive, send)

    def _take(self, client: bytes) -> float:
        """Count a request; returns seconds until it would be allowed, 0 where it is."""
        now, rate = self.clock(), self.per_minute / 60
        left, before = self.left.pop(client, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - before) * rate)
        allowed = left >= 1
        self.left[client] = (left - 1 if allowed else left, now)
        if len(self.left) > MAX_CLIENTS:
            self.left.popitem(last=False)
        return 0.0 if allowed else (1 - left) / rate


def _client(scope: Scope) -> bytes:
    """Who asks; of a key only a hash is kept."""
    key = Headers(scope=scope).get("authorization")
    return sha256((key or str((scope.get("client") or ("",))[0])).encode()).digest()
