"""Requests between a run's processes and its service: a line of JSON each way over TCP.

A client repeats a request until it is answered, so that the service may be killed and started again at any moment; every request
must therefore be one that may arrive twice, and late: it carries the generation, the worker's incarnation or an
identifier of its own.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from luban.core.artifact import atomic_write
from luban.core.errors import LubanError, TrainingError

LONGEST = 1 << 20  # bytes of a line
PAUSE = 0.05  # seconds between two attempts
ANSWER_SECONDS = 20.0  # after which a request is sent again
Operations = Mapping[str, Callable[..., Any]]


class Refused(LubanError):
    """What the service does not do; the message says why."""


class OperationFailed(LubanError):
    """An operation of the service has failed in a way that nobody expected; asking again would not help."""


class StaleGeneration(LubanError):
    """A request of a worker that belongs to an earlier generation than the run's."""


class Client:
    """Calls operations of the service by name.

    Args:
        address: the file in which the service writes where it listens.
        patience: seconds in which a service that doesn't answer must be back.
    """

    def __init__(self, address: Path, patience: float = 60.0):
        self.address, self.patience = address, patience
        self._socket: socket.socket | None = None
        self._stream: Any = None
        self._token = ""

    def __call__(self, operation: str, **fields: Any) -> Any:
        """The operation's result.

        Raises:
            Refused: the service doesn't do it.
            StaleGeneration: the caller's generation is over.
            OperationFailed: the operation has raised any other exception.
            TrainingError: no service has answered for `patience` seconds.
        """
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return _result(self._ask(operation, fields))
            except (OSError, ValueError):  # gone, or killed in the middle of a line
                self.close()
            if time.monotonic() > deadline:
                raise TrainingError(
                    f"the service of this run ({self.address}) has not answered for {self.patience:.0f} seconds"
                )
            time.sleep(PAUSE)

    def fileno(self) -> int:
        """Of the connection; -1 where there is none."""
        return -1 if self._socket is None else self._socket.fileno()

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        with contextlib.suppress(OSError):
            for each in (self._stream, self._socket):
                if each is not None:
                    each.close()
        self._socket = self._stream = None

    def _ask(self, operation: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        if self._socket is None:
            where = json.loads(self.address.read_text())
            self._token = where["token"]
            self._socket = socket.create_connection((where["host"], where["port"]), timeout=ANSWER_SECONDS)
            self._stream = self._socket.makefile("rwb")
        line = json.dumps({"token": self._token, "operation": operation, "fields": fields})
        self._stream.write(line.encode() + b"\n")
        self._stream.flush()
        return json.loads(self._stream.readline(LONGEST))


def _result(answer: dict[str, Any]) -> Any:
    if "stale" in answer:
        raise StaleGeneration(answer["stale"])
    if "refused" in answer:
        raise Refused(answer["refused"])
    if "failed" in answer:
        raise OperationFailed(f"the service of this run has failed: {answer['failed']}")
    return answer["result"]


class Server:
    """Answers requests by `operations`, one at a time, each in a thread of its connection.

    Args:
        address: file to write host, port and a secret token to, which every request must carry; its folder is private.
        port: to listen on; 0, or one that is taken: any free one.
    """

    def __init__(self, operations: Operations, address: Path, host: str = "127.0.0.1", port: int = 0):
        self.operations, self.token = operations, secrets.token_hex(16)
        self.lock = threading.Lock()
        try:
            self.tcp = _Listener((host, port), self)
        except OSError:
            self.tcp = _Listener((host, 0), self)
        where = {"host": host, "port": self.tcp.server_address[1], "token": self.token}
        atomic_write(address, json.dumps(where))
        self.thread = threading.Thread(target=self.tcp.serve_forever, args=(0.1,), daemon=True)

    def start(self) -> Server:
        """Answer from now on."""
        self.thread.start()
        return self

    def stop(self) -> None:
        """Answer nothing more."""
        self.tcp.shutdown()
        self.tcp.server_close()

    def answer(self, line: bytes) -> dict[str, Any]:
        """The answer to a request. Raises ValueError for what none is, and for another token: the client may have read the
        address before this service wrote it, and reads it again for its next connection."""
        request = json.loads(line)
        if not isinstance(request, dict) or not secrets.compare_digest(str(request.get("token")), self.token):
            raise ValueError("no request of this run")
        operation = self.operations.get(request["operation"])
        if operation is None:
            return {"refused": f"no operation {request['operation']!r}: another version of Luban asks"}
        try:
            with self.lock:
                return {"result": operation(**request["fields"])}
        except StaleGeneration as error:
            return {"stale": str(error)}
        except Refused as error:
            return {"refused": str(error)}
        except Exception as error:  # an answer, since a client that gets none asks again until its patience ends
            return {"failed": f"{type(error).__name__}: {error}"}


class _Listener(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], server: Server):
        self.server = server
        super().__init__(address, _Connection)


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    server: Any

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while line := self.rfile.readline(LONGEST):
                self.wfile.write(json.dumps(self.server.server.answer(line)).encode() + b"\n")
