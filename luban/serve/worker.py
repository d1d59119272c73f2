"""The one thread that runs the model, so that the server's own thread always answers."""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

from luban.core.errors import LubanError
from luban.core.log import say
from luban.generate.token_mask import StructureError
from luban.serve.batch import LostProcess
from luban.serve.request import Delta, Request

STEP_SECONDS = 30.0  # that stopping waits for the step that is running
POLL_SECONDS = 0.1


Result = TypeVar("Result")


class Steps(Protocol):
    """What a worker steps: `luban.serve.engine.Engine`, or nothing."""

    def submit(self, request: Request) -> None:
        """Queue a request."""
        ...

    def step(self) -> bool:
        """Work a little; returns whether there is more to do."""
        ...

    def fail(self, error: Exception) -> None:
        """Give up all requests."""
        ...


class GenerationError(LubanError):
    """The model failed while it was generating."""


class Worker:
    """Steps an engine while there is work. Start it before the first request, stop it at the end."""

    def __init__(self, engine: Steps):
        self.engine = engine
        self._wake, self._stopped, self._left = threading.Event(), threading.Event(), threading.Event()
        self._calls: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._thread = threading.Thread(target=self._run, name="luban-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the step that is running, and no more; `leave` ends the wait for it."""
        self._stopped.set()
        self._wake.set()
        for _ in range(int(STEP_SECONDS / POLL_SECONDS)):
            if self._left.is_set() or not self._thread.is_alive():
                return
            self._thread.join(POLL_SECONDS)

    def leave(self) -> None:
        """Don't wait for the step that is running; safe from signal handlers."""
        self._left.set()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def calls_waiting(self) -> int:
        """Functions that wait to be run between steps."""
        return len(self._calls)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                self._call()
                while self.engine.step() and not self._stopped.is_set():
                    self._call()
            except Exception as error:  # whatever broke must reach those who wait, and not end the server
                if not isinstance(error, LostProcess):  # which ends the server, with this reason
                    say(traceback.format_exc())
                self.engine.fail(error)

    def _call(self) -> None:
        """Run what waits to be run between steps."""
        while self._calls:
            future, function = self._calls.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)

    async def between_steps(self, function: Callable[[], Result]) -> Result:
        """Run a function that uses the model in the thread that runs the model, and return what it returns."""
        future: Future = Future()
        self._calls.append((future, function))
        self._wake.set()
        return await asyncio.wrap_future(future)

    async def run(self, requests: list[Request]) -> AsyncGenerator[tuple[int, Delta], None]:
        """Deltas of all requests as they come, each with its request's index.

        Closing the iterator, as a client's disconnect does, cancels what isn't done.

        Raises:
            GenerationError: the model failed, or the request's adapter couldn't be read.
            StructureError: a request's structure can't be followed further.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue()

        def listen(index: int) -> Callable[[Delta], None]:
            def hand_over(delta: Delta) -> None:
                loop.call_soon_threadsafe(arrived.put_nowait, (index, delta))

            return hand_over

        for index, request in enumerate(requests):
            request.listener = listen(index)
            self.engine.submit(request)
        self._wake.set()
        left = sum(len(request.result.choices) for request in requests)
        try:
            while left:
                index, delta = await arrived.get()
                error = requests[index].error
                if isinstance(error, StructureError):
                    raise error
                if error is not None:
                    known = isinstance(error, LubanError)  # such as an adapter that is gone from the disk
                    raise GenerationError(str(error) if known else f"the model failed while generating: {error}")
                left -= delta.finish_reason is not None
                yield index, delta
        finally:
            for request in requests:
                request.cancel()
