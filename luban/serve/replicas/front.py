"""The front: one address that passes requests on to replicas, and starts those again that end."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager, suppress

import httpx
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from luban.core.errors import LubanError
from luban.core.log import say
from luban.serve.api.errors import RETRY_AFTER, error_body
from luban.serve.replicas.process import Replica
from luban.serve.replicas.routing import Router, text_of

HOP_BY_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer", b"proxy-authorization"}
SERVERS = {b"date", b"server"}  # headers that every server adds to an answer, the front's too
OWN = {b"host", b"authorization", b"content-length", b"origin"}  # what the front answers for itself
NAMED = b"luban-replica"  # header of answers: which one gave it
SHOWS_AFTER = 0.05  # seconds from a broken connection until the end of its process shows
SHORT = 10.0  # seconds; a replica that lives no longer than this after its start is not started a third time at once
SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?( .*)$")


class Front:
    """An ASGI application over replicas.

    Args:
        start: number, callback → a started replica.
        count: of replicas.
        key: that replicas ask for.
        on_loaded: called when the first is ready.
    """

    def __init__(
        self,
        start: Callable[[int, Callable[[Replica], None]], Replica],
        count: int,
        key: str,
        on_loaded: Callable[[], None],
    ):
        self._start, self.count, self.key, self.on_loaded = start, count, key, on_loaded
        self.router = Router(count)
        self.replicas: list[Replica] = []
        self.broken: LubanError | None = None
        self.draining = False
        self.stopped = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._began: dict[int, list[float]] = {number: [] for number in range(count)}
        self._was_ready = False
        self._again: set[asyncio.Task] = set()

    @property
    def ready(self) -> bool:
        """Whether some replica answers."""
        return any(replica.address for replica in self.replicas)

    @asynccontextmanager
    async def life(self):
        """Replicas run inside of it."""
        self._loop = asyncio.get_running_loop()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        async with httpx.AsyncClient(timeout=None, limits=limits) as self.client:
            self.replicas = [self._begin(number) for number in range(self.count)]
            try:
                yield
            finally:
                self.end(signal.SIGKILL)

    def end(self, signal_number: int) -> None:
        """Send all replicas a signal, and start none again."""
        self.draining = True
        for replica in self.replicas:
            replica.end(signal_number)

    def _begin(self, number: int) -> Replica:
        self._began[number].append(time.monotonic())
        return self._start(number, self._changed)

    def _changed(self, replica: Replica) -> None:
        """From a replica's own thread."""
        if self._loop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):  # the loop has just been closed
                self._loop.call_soon_threadsafe(self._look_at, replica)

    def _look_at(self, replica: Replica) -> None:
        if replica.address is not None:
            if not self._was_ready:
                self._was_ready = True
                self.on_loaded()
            return
        if self.draining:
            if all(each.code is not None for each in self.replicas):
                self.stopped.set()
            return
        number, code = replica.number, replica.code
        self.router.forget(number)
        if not self._was_ready:  # what is wrong with one is wrong with all
            self.broken = LubanError(f"replica {number} ended with exit code {code} before it had loaded its model")
            self.end(signal.SIGTERM)
            self.stopped.set()
            return
        soon = time.monotonic() - self._began[number][-1] < SHORT
        say(f"replica {number} ended with exit code {code}, and is started again")
        task = asyncio.ensure_future(self._restart(number, SHORT if soon else 0.0))
        self._again.add(task)
        task.add_done_callback(self._again.discard)

    async def _restart(self, number: int, wait: float) -> None:
        await asyncio.sleep(wait)
        if not self.draining:
            self.replicas[number] = self._begin(number)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/health":
            return await self._health()(scope, receive, send)
        if not self.ready or self.draining:
            said, code = ("is being stopped", None) if self.draining else ("is still being loaded", "loading")
            body = error_body(f"the model {said}", kind="server_error", code=code)
            return await JSONResponse(body, 503, RETRY_AFTER)(scope, receive, send)
        if path == "/metrics":
            return await (await self._metrics())(scope, receive, send)
        try:
            await self._pass_on(scope, receive, send)
        except HTTPException as error:  # a body that is too large
            await JSONResponse(error_body(error.detail), error.status_code, error.headers)(scope, receive, send)

    def _health(self) -> Response:
        status = "draining" if self.draining else "ok" if self.ready else "loading"
        states = ["ready" if r.address else "loading" if r.code is None else "ended" for r in self.replicas]
        return JSONResponse({"status": status, "replicas": states}, 200 if status == "ok" else 503)

    async def _metrics(self) -> Response:
        """Every replica's samples with its number as a label, and each metric's description once."""
        described: dict[str, list[str]] = {}
        samples: dict[str, list[str]] = {}
        for replica in self.replicas:
            if replica.address is None:
                continue
            with suppress(httpx.HTTPError):
                answer = await self.client.get(f"{replica.address}/metrics", headers=self._headers([]))
                family = ""
                for line in answer.text.splitlines():
                    if line.startswith("#"):
                        family = line.split()[2]
                        described.setdefault(family, [])
                        if line not in described[family]:
                            described[family].append(line)
                    elif found := SAMPLE.match(line):
                        labels = f'replica="{replica.number}"' + (f",{found[2]}" if found[2] else "")
                        samples.setdefault(family, []).append(f"{found[1]}{{{labels}}}{found[3]}")
        lines = [line for family, about in described.items() for line in (*about, *samples.get(family, ()))]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    def _headers(self, given: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Of a request to a replica."""
        kept = [(name, value) for name, value in given if name.lower() not in HOP_BY_HOP | OWN]
        return [*kept, (b"authorization", f"Bearer {self.key}".encode())]

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        working = asyncio.ensure_future(self._answer(scope, bytes(body), send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:  # a client that leaves ends the work of the replica
            for task in (working, leaving):
                task.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        """Let the replica answer that suits the request; another one where it can't be reached."""
        text = text_of(body) if scope["method"] == "POST" else ""
        query = scope["query_string"].decode("latin-1")
        path = scope["path"] + (f"?{query}" if query else "")
        left = {replica.number: replica.address for replica in self.replicas if replica.address}
        while left:
            number = self.router.choose(text, left)
            request = self.client.build_request(
                scope["method"], f"{left.pop(number)}{path}", content=body, headers=self._headers(scope["headers"])
            )
            self.router.begin(number, text)
            try:
                if await self._told(request, number, send):
                    return
            finally:
                self.router.end(number)
        answer = JSONResponse(error_body("no replica can be reached", kind="server_error"), 503, RETRY_AFTER)
        await answer(scope, _nothing, send)

    async def _runs(self, number: int) -> bool:
        """Whether a replica whose connection broke is still there; else it is asked no more."""
        await asyncio.sleep(SHOWS_AFTER)
        replica = self.replicas[number]
        if replica.code is not None:
            replica.address = None
        return replica.address is not None

    async def _told(self, request: httpx.Request, number: int, send: Send) -> bool:
        """Pass a replica's answer on. False: it can't be reached, and has done nothing."""
        streams = False
        try:
            answer = await self.client.send(request, stream=True)
        except httpx.ConnectError:
            return False
        except httpx.HTTPError as error:
            if await self._runs(number):  # it had closed a connection that was idle
                return False
            body = error_body(_lost(number, error), kind="server_error", code="replica_lost")
            await JSONResponse(body, 503, RETRY_AFTER)({"type": "http"}, _nothing, send)
            return True
        try:
            kept = [(name, value) for name, value in answer.headers.raw if name.lower() not in HOP_BY_HOP | SERVERS]
            streams = answer.headers.get("content-type", "").startswith("text/event-stream")
            headers = [*kept, (NAMED, str(number).encode())]
            await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
            try:
                async for piece in answer.aiter_raw():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except httpx.HTTPError as error:
                await self._runs(number)
                if not streams:
                    raise  # the length was promised: the connection is cut
                body = error_body(_lost(number, error), kind="server_error", code="replica_lost")
                event = f"data: {json.dumps(body)}\n\n".encode()
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await answer.aclose()
        return True


def _lost(number: int, error: Exception) -> str:
    return f"replica {number} was lost while it answered ({type(error).__name__}): send the request again"


async def _left(receive: Receive) -> None:
    """Until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> dict[str, str]:
    return {"type": "http.disconnect"}


def guarded(front: Front, wrap: Callable[[ASGIApp], ASGIApp]) -> ASGIApp:
    """The front behind what stands before routes; its life is the application's."""
    inner = wrap(front)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await inner(scope, receive, send)
        await receive()
        async with front.life():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    return app
