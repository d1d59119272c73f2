"""`luban serve MODEL --replicas N`."""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from luban.core.log import say, warn
from luban.serve.api.answers import LEFT_OUT
from luban.serve.api.body_limit import BodyLimit
from luban.serve.api.chat_page import PAGE
from luban.serve.api.guard import KeyGuard, SiteGuard, check_sites
from luban.serve.api.rate_limit import RateLimit
from luban.serve.replicas.front import NAMED, Front, guarded
from luban.serve.replicas.process import Replica, environments
from luban.serve.run import address_of, bind, log_no_cancellations

if TYPE_CHECKING:
    from luban.serve.api.app import ServerOptions

LARGEST = 64 * 2**20  # bytes of a body; replicas refuse what is too large for their model


def serve_replicas(
    words: Sequence[str],
    count: int,
    *,
    name: str,
    device: str,
    gpus: int,
    host: str,
    port: int,
    options: ServerOptions,
) -> None:
    """Start `luban WORDS` so many times, and pass requests on to them until interrupted.

    Args:
        words: a command line of `luban serve`, without address and guards, which are the front's.
        name: of the model, for people.
        gpus: of each replica, where there are any.
        options: of the front: key, names, sites, requests a minute.

    Raises LubanError where the first replicas end before they have loaded the model.
    """
    check_sites(options.origins, options.hosts)
    listener, key = bind(host, port), secrets.token_urlsafe(32)
    address = address_of(host, listener)
    every = environments(count, device=device, gpus=gpus, key=key)
    child = [*words, "--host", "127.0.0.1", "--port", "0"]

    def start(number: int, changed: Callable[[Replica], None]) -> Replica:
        return Replica(number, child, every[number], changed)

    def loaded() -> None:
        if not options.api_key:
            warn("no --api-key is set: everyone who can reach this address can use the model")
        say(f"serving {name} at {address}  ({count} replicas; the API is at {address}/v1; Ctrl-C stops)")

    front = Front(start, count, key, loaded)

    def wrap(app: ASGIApp) -> ASGIApp:
        app = BodyLimit(app, limit=lambda: LARGEST)
        if options.requests_per_minute:
            app = RateLimit(app, options.requests_per_minute)
        if options.api_key:
            app = KeyGuard(app, options.api_key, frozenset({"/health", *PAGE}))
        app = SiteGuard(app, hosts=frozenset((host, *options.hosts)), origins=frozenset(options.origins))
        if options.origins:
            app = CORSMiddleware(
                app,
                options.origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=[LEFT_OUT, NAMED.decode()],
            )
        return app

    config = uvicorn.Config(
        guarded(front, wrap), log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=3
    )

    class Server(uvicorn.Server):
        """Replicas that are terminated end their answers first; the front leaves behind them."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit or front.draining or sig != signal.SIGTERM:
                front.end(signal.SIGKILL)
                super().handle_exit(sig, frame)
            else:
                front.end(signal.SIGTERM)

        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            self._leaving = asyncio.ensure_future(self._leave())

        async def _leave(self) -> None:
            await front.stopped.wait()
            self.should_exit = True

    log_no_cancellations()
    try:
        Server(config).run(sockets=[listener])
    finally:
        listener.close()
    if front.broken is not None:
        raise front.broken
