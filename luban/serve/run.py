"""Starting the server: a free port, the address printed, a warning where no key is set."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from types import FrameType

from luban.core.errors import DataError, MissingExtra
from luban.core.log import say, warn
from luban.load.model import LoadedModel
from luban.serve.engine import Engine

INTERRUPTED = 130  # exit code
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


def serve(
    model: LoadedModel,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    hosts: Sequence[str] = (),
    origins: Sequence[str] = (),
) -> None:
    """Serve `model` until interrupted; `hosts` and `origins` as in `create_app`."""
    try:
        import uvicorn

        from luban.serve.guard import check_sites
        from luban.serve.http import create_app
    except ImportError as error:
        raise MissingExtra(error.name or "fastapi", "serve", "luban serve") from None
    check_sites(origins, hosts)
    model.need_tokenizer()
    engine = Engine(model)  # a model that writes no text is refused before an address is announced
    listener = bind(host, port)
    actual = listener.getsockname()[1]
    if port and actual != port:
        say(f"port {port} is taken, using {actual}")
    if not api_key:
        warn("no --api-key is set: everyone who can reach this address can use the model")
    address = f"http://{f'[{host}]' if ':' in host else host}:{actual}"
    say(f"serving {model.name} at {address}  (chat page; the API is at {address}/v1; Ctrl-C stops)")
    app = create_app(engine, api_key=api_key, hosts=[host, *hosts], origins=origins)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=3)

    class Server(uvicorn.Server):
        """Ends running answers when it is told to stop, so that they aren't cut off after the three seconds. Told again it
        doesn't wait for the model's step; uvicorn, told again, would cancel its own tasks with a traceback."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                app.state.service.worker.leave()
                return
            app.state.service.stop()
            super().handle_exit(sig, frame)

    try:
        Server(config).run(sockets=[listener])
    finally:
        listener.close()
        if app.state.service.worker.alive:  # a thread inside torch can't be ended, and aborts an interpreter that ends
            say("luban: stopped without waiting for the model's last step")
            os._exit(INTERRUPTED)
