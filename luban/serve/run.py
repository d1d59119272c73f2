"""Starting the server: a free port, the address printed, a warning where no key is set."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from luban.core.errors import DataError, MissingExtra
from luban.core.log import say, warn
from luban.load.model import LoadedModel
from luban.serve.batch import LostProcess
from luban.serve.engine import Engine

if TYPE_CHECKING:
    from luban.serve.api.app import ServerOptions
    from luban.serve.api.service import Service

INTERRUPTED = 130  # exit code
SAY_LOADING_AFTER = 2.0  # seconds
TRIES = 100  # ports looked at beyond the one asked for


def bind(host: str, port: int) -> socket.socket:
    """A listening socket at the first free port from `port` on (0: any). Raises DataError when there is none."""
    problem: OSError | None = None
    for candidate in range(port, min(port + TRIES, 65_536)) if port else (0,):
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, candidate))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            problem = error
    raise DataError(f"no free port at {host} from {port} to {port + TRIES - 1}: {problem}")


def address_of(host: str, listener: socket.socket) -> str:
    """The URL of a listening socket."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def log_no_cancellations() -> None:
    """A uvicorn server told to leave while its tasks run cancels them, which nobody needs a traceback of."""
    logging.getLogger("uvicorn.error").addFilter(_no_cancellation)


def _no_cancellation(record: logging.LogRecord) -> bool:
    return "CancelledError" not in record.getMessage()


def serve(
    load: Callable[[], LoadedModel],
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    options: ServerOptions | None = None,
    engine: Callable[[LoadedModel], Engine] = Engine,
    drain_seconds: float = 30.0,
) -> None:
    """Serve a model until interrupted; the address answers 503 while it is loaded.

    Args:
        load: gives the model.
        name: for people, until it is loaded.
        options: as in `luban.serve.api.app.create_app`.
        engine: makes the engine.
        drain_seconds: that answers may go on for after SIGTERM. Ctrl-C, or another signal, ends them at once.

    Raises what `load` and `engine` raise.
    """
    try:
        import uvicorn

        from luban.serve.api.app import ServerOptions, create_app, engine_or_model
        from luban.serve.api.guard import check_sites
    except ImportError as error:
        raise MissingExtra(error.name or "fastapi", "serve", "luban serve") from None
    options = options or ServerOptions()
    check_sites(options.origins, options.hosts)
    listener = bind(host, port)
    actual = listener.getsockname()[1]
    options = replace(options, hosts=(host, *options.hosts))
    address = address_of(host, listener)
    app = create_app(lambda: engine_or_model(load(), engine), options)
    service: Service = app.state.service
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)

    class Server(uvicorn.Server):
        """Lets running answers end when it is terminated, and ends them when it is interrupted or told again, so that they
        aren't cut off after the three seconds. Told once more it doesn't wait for the model's step; uvicorn, told again,
        would cancel its own tasks with a traceback."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            loop = service.loop
            if self.should_exit:
                if service.worker is not None:
                    service.worker.leave()
            elif sig == signal.SIGTERM and service.ready and not service.draining and loop is not None:
                service.draining = True
                loop.call_soon_threadsafe(lambda: loop.create_task(self.drain()))
            else:
                service.stop()
                super().handle_exit(sig, frame)

        async def drain(self) -> None:
            """Leave once what runs has ended."""
            await service.drain(drain_seconds)
            self.should_exit = True

    server = Server(config)
    log_no_cancellations()

    loading = threading.Timer(SAY_LOADING_AFTER, say, [f"loading {name}; until it is loaded {address} answers 503"])
    loading.daemon = True

    def lost(error: LostProcess) -> None:
        """End what runs with an error, and the server."""
        service.broken = error
        service.stop()
        if service.worker is not None:
            service.worker.leave()
        server.should_exit = True

    def loaded() -> None:
        loading.cancel()
        if service.broken is not None:
            server.should_exit = True
        else:
            if service.engine is not None:
                service.engine.batch.watch(lost)
            if port and actual != port:
                say(f"port {port} is taken, using {actual}")
            if not options.api_key:
                paths = ", and have it read adapters from any folder of this machine" if options.more_adapters else ""
                warn(f"no --api-key is set: everyone who can reach this address can use the model{paths}")
            about = "chat page; the API is" if service.engine is not None else "embeddings; the API is"
            say(f"serving {service.model.name} at {address}  ({about} at {address}/v1; Ctrl-C stops)")

    service.on_loaded = loaded
    loading.start()
    try:
        server.run(sockets=[listener])
    finally:
        loading.cancel()
        listener.close()
        if isinstance(service.broken, LostProcess):
            say(f"luban: {service.broken}")
            os._exit(service.broken.exit_code)  # what waits for that process can't be ended in another way
        if service.worker is not None and service.worker.alive:
            # a thread inside torch can't be ended, and aborts an interpreter that ends
            say("luban: stopped without waiting for the model's last step")
            os._exit(INTERRUPTED)
        if service.engine is not None:
            service.engine.close()
    if service.broken is not None:
        raise service.broken
