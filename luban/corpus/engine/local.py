"""Parts in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from luban.core.errors import ConfigError, LubanError
from luban.core.log import Bar
from luban.corpus.engine import WorkerLost
from luban.corpus.engine.phase import Task, run_task

POLL = 0.5  # seconds between two looks at what the workers have counted
_counted: Any = None  # in a worker: the documents that all workers have counted


class LocalExecutor:
    """One process a worker; a single worker is this process."""

    def __init__(self, workers: int):
        if workers < 1:
            raise ConfigError(f"workers: at least 1 is needed, {workers} given")
        self.workers = workers
        self.pool: ProcessPoolExecutor | None = None
        self.counted: Any = None

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _pool(self) -> ProcessPoolExecutor:
        """The workers, started when first needed and kept for all phases."""
        if self.pool is None:
            context = multiprocessing.get_context("spawn")
            self.counted = context.Value("q", 0)
            self.pool = ProcessPoolExecutor(self.workers, context, _begin, (self.counted,))
        return self.pool

    def run(self, tasks: Sequence[Task], bar: Bar) -> None:
        """Run every task, in any order.

        Raises:
            LubanError: what a task raised.
            WorkerLost: a worker died.
        """
        if min(self.workers, len(tasks)) <= 1:
            for task in tasks:
                run_task(task, bar.advance)
            return
        pool = self._pool()
        self.counted.value = 0
        waiting = {pool.submit(_run, task) for task in tasks}
        try:
            while waiting:
                done, waiting = wait(waiting, POLL, FIRST_EXCEPTION)
                bar.advance(self.counted.value - bar.done)
                for future in done:
                    if (error := future.result()) is not None:
                        raise error
        except BrokenProcessPool:
            raise WorkerLost(
                "a corpus worker died, most likely for lack of memory: run the same command again to go on, "
                "with fewer --workers"
            ) from None


def _begin(counted: Any) -> None:
    global _counted
    _counted = counted
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a killed build must not leave its workers behind
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _run(task: Task) -> LubanError | None:
    def report(documents: int) -> None:
        with _counted.get_lock():
            _counted.value += documents

    try:
        run_task(task, report)
    except LubanError as error:  # returned, so that it comes back without the worker's traceback
        return error
    return None
