"""The training loop of a worker: its rows come from the service, and its state is copied to memory at step boundaries."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from luban.core.errors import LubanError
from luban.core.log import Bar
from luban.data.batch import Batch
from luban.data.loader import Loader
from luban.train.elastic.flash import FlashMemory
from luban.train.elastic.link import Link, RankAssignment
from luban.train.interrupt import StopRequest
from luban.train.loop import Loop
from luban.train.metrics_logger import MetricsLogger, NoMetrics


class MembershipChange(LubanError):
    """Workers have joined or leave: the generation ends at this step."""


class LeasedLoader(Loader):
    """Batches whose rows the service hands out.

    Args:
        pieces: micro-batches of a step.
    """

    def __init__(self, link: Link, assignment: RankAssignment, pieces: int, **loader):
        super().__init__(**loader)
        self.link, self.assignment, self.pieces = link, assignment, pieces

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """This worker's rows of each batch from `start_step` on. Raises MembershipChange, StaleGeneration."""
        yield from self.shares(self._leases(start_step))
        raise MembershipChange("the workers of this run change")

    def _leases(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        rows = self.batch_size // self.pieces
        for step in count(start):
            lease = self.link.client(
                "lease", generation=self.assignment.generation, step=step, rows=rows, pieces=self.pieces
            )
            if lease.get("change"):
                return
            begin, end = lease["bounds"][self.assignment.rank : self.assignment.rank + 2]
            yield step, (np.arange(self.pieces)[:, None] * rows + np.arange(begin, end)).reshape(-1)


class ElasticLoop(Loop):
    """Trains as a member of a generation.

    Args:
        flash_every: steps between copies of the state.
    """

    def __init__(self, *parts, link: Link, assignment: RankAssignment, flash: FlashMemory, flash_every: int, **named):
        super().__init__(*parts, goodput=link.goodput, **named)
        self.link, self.assignment, self.flash, self.flash_every = link, assignment, flash, flash_every
        self.kept = self.reported = self.state.progress.step
        self.computed = self.goodput.seconds()["compute"]

    def _flash_is_due(self) -> bool:
        return self._due(self.flash_every)

    def _must_synchronize(self, stop: StopRequest) -> bool:
        return self._flash_is_due() or super()._must_synchronize(stop)

    def _validate_and_save(self, metrics: MetricsLogger | NoMetrics, stop: StopRequest, bar: Bar) -> None:
        computed = self.goodput.seconds()["compute"] - self.computed  # without validation
        super()._validate_and_save(metrics, stop, bar)
        at = self.state.progress
        if self.in_flight or not self._flash_is_due() or at.step == self.kept:
            return
        with self.goodput.spent("checkpoint"):
            at.seconds = self._elapsed()
            self.flash.write(self.state.to_checkpoint(), at.step)
        self.kept = at.step
        self.goodput.finished(at.step)
        self._report(computed)

    def _goodput(self) -> dict[str, dict[str, float]]:
        """Seconds of all workers of the run by kind, also of those that were lost."""
        return {"goodput": self.link.client("figures")["goodput"]}

    def _report(self, computed: float) -> None:
        """Tell the service of the steps since the last copy, which this worker can't lose any more."""
        steps = range(self.reported, self.kept)
        for step in steps:
            self.link.client(
                "done",
                name=self.link.worker.name,
                incarnation=self.link.worker.incarnation,
                generation=self.assignment.generation,
                step=step,
                rank=self.assignment.rank,
                seconds=computed / len(steps),
                ledger=self.goodput.seconds(),
            )
        self.reported = self.kept
        self.computed = self.goodput.seconds()["compute"]
