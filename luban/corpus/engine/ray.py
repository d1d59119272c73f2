"""Parts as rows of a Ray dataset, mapped by the workers of a cluster whose machines see the same folders."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Sequence
from typing import Any

from luban.core.errors import ConfigError, LubanError, MissingExtra
from luban.core.log import Bar
from luban.corpus.engine import WorkerLost
from luban.corpus.engine.phase import Task, read_marker, run_task

RETRIES = 3  # of a task whose worker died, so that a part that takes all memory is given up


class RayExecutor:
    """At most `workers` tasks of Ray Data at a time, on the cluster at RAY_ADDRESS or on one started for this build.

    A row is a part of the corpus; what its task makes lies in the build's folder, so that a build that is killed goes on
    with the parts that are missing, and the bytes are those of a local build.
    """

    def __init__(self, workers: int):
        if workers < 1:
            raise ConfigError(f"workers: at least 1 is needed, {workers} given")
        try:
            import ray
            import ray.data
        except ImportError:
            raise MissingExtra("ray", "ray", "a corpus build on Ray") from None
        self.ray, self.workers, self.started = ray, workers, False

    def __enter__(self) -> RayExecutor:
        if not self.ray.is_initialized():
            self.ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            self.started = True
        context = self.ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
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
        if not tasks:
            return
        rows = [{"task": pickle.dumps(task)} for task in tasks]
        parts = self.ray.data.from_items(rows, override_num_blocks=len(rows))
        done = parts.map(_run, num_cpus=1, concurrency=self.workers, ray_remote_args_fn=_options)
        try:
            for row in done.iter_rows():
                if row["error"]:
                    raise pickle.loads(row["error"])
                bar.advance(row["documents"])
        except self.ray.exceptions.RayError as failure:
            raise WorkerLost(f"Ray gave up a part of the corpus: {str(failure).strip().splitlines()[-1]}") from None


def _options() -> dict[str, Any]:
    return {"max_retries": RETRIES}


def _run(row: dict[str, Any]) -> dict[str, Any]:
    task = pickle.loads(row["task"])
    try:
        run_task(task, lambda documents: None)
    except LubanError as error:  # returned, since Ray wraps what is raised
        return {"documents": 0, "error": pickle.dumps(error)}
    left = read_marker(task)["waterfall"]
    return {"documents": left[-1]["documents"] if left else 0, "error": b""}
