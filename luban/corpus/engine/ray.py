"""Parts as tasks of a Ray cluster, whose machines see the same folders."""

from __future__ import annotations

from collections.abc import Sequence

from luban.core.errors import ConfigError, LubanError, MissingExtra
from luban.core.log import Bar
from luban.corpus.engine import WorkerLost
from luban.corpus.engine.phase import Task, read_marker, run_task

RETRIES = 3  # of a task whose worker died


class RayExecutor:
    """At most `workers` tasks at a time on the cluster at RAY_ADDRESS, or on one started for this build."""

    def __init__(self, workers: int):
        if workers < 1:
            raise ConfigError(f"workers: at least 1 is needed, {workers} given")
        try:
            import ray
        except ImportError:
            raise MissingExtra("ray", "ray", "a corpus build on Ray") from None
        self.ray, self.workers, self.started = ray, workers, False

    def __enter__(self) -> RayExecutor:
        if not self.ray.is_initialized():
            self.ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            self.started = True
        return self

    def __exit__(self, *error: object) -> None:
        if self.started:
            self.ray.shutdown()

    def run(self, tasks: Sequence[Task], bar: Bar) -> None:
        """Run every task, in any order.

        Raises:
            LubanError: what a task raised.
            WorkerLost: Ray gave a task up.
        """
        remote = self.ray.remote(num_cpus=1, max_retries=RETRIES)(_run)
        waiting, running = list(reversed(tasks)), {}
        while waiting or running:
            while waiting and len(running) < self.workers:
                task = waiting.pop()
                running[remote.remote(task)] = task
            (done, *_), _ = self.ray.wait(list(running), num_returns=1)
            task = running.pop(done)
            self._result(done)
            rows = read_marker(task)["waterfall"]
            bar.advance(rows[-1]["documents"] if rows else 0)

    def _result(self, done: object) -> None:
        try:
            error = self.ray.get(done)
        except self.ray.exceptions.RayError as failure:
            raise WorkerLost(f"Ray gave up a part of the corpus: {str(failure).splitlines()[-1]}") from None
        if error is not None:
            raise error


def _run(task: Task) -> LubanError | None:
    try:
        run_task(task, lambda documents: None)
    except LubanError as error:  # returned, since Ray wraps what is raised
        return error
    return None
