"""Request ids, and a log of one JSON line a request without the text of prompts or answers."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Request-Id"
TAKEN = re.compile(r"[\w.:-]{1,128}")  # ids that a client may choose


class RequestLog:
    """Gives every request an id (the client's, where it sends one) and writes a line when it has been answered.

    `scope["state"]["request_id"]` and `scope["state"]["note"]`, a table that routes add figures to, are for routes.

    Args:
        write: takes a line; None: nothing is logged.
    """

    def __init__(self, app: ASGIApp, write: Callable[[str], None] | None = None):
        self.app, self.write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get(HEADER, "")
        name = given if TAKEN.fullmatch(given) else uuid.uuid4().hex
        note: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=name, note=note)
        began, status = time.time(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        try:
            await self.app(scope, receive, named)
        finally:
            if self.write is not None:
                head = {"time": round(began, 3), "request_id": name, "method": scope["method"], "path": scope["path"]}
                seconds = round(time.time() - began, 4)
                self.write(json.dumps({**head, "status": status or 500, "seconds": seconds, **note}))
