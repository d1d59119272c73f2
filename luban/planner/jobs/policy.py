"""What happens to a job's resources while it runs: nothing, or what its measurements say."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from luban.planner.jobs.job import EFFICIENT, MOST_WORKERS, Job
from luban.planner.jobs.throughput import fit


@dataclass
class Measurements:
    """What a running job has shown of itself."""

    times: dict[int, list[float]] = field(default_factory=dict)  # workers → seconds of an iteration
    memory: list[tuple[float, float]] = field(default_factory=list)  # (share of the iterations done, GB in use)

    def wanted_workers(self, now: int) -> int:
        """The right size by all that was measured, at most twice or half of the present one, whose speed is known."""
        model = fit({workers: statistics.fmean(times) for workers, times in self.times.items()})
        wanted = model.right_size(EFFICIENT, MOST_WORKERS)
        return min(max(wanted, -(-now // 2)), 2 * now)

    def wanted_memory(self, margin: float) -> float | None:
        """GB at the end by the line through the first and the last measurement; None: not known yet."""
        if len(self.memory) < 2 or self.memory[-1][0] <= self.memory[0][0]:
            return None
        (start, low), (end, high) = self.memory[0], self.memory[-1]
        return margin * (high + (high - low) / (end - start) * (1 - end))


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How requests are treated.

    Without `resizes` a job keeps what was requested, and one that runs out of memory is submitted again by its owner, who asks
    for twice as much. With it, sizes follow measurements; new jobs begin with what finished ones needed.
    """

    resizes: bool
    interval: float = 300.0  # seconds between two looks at a job
    pause: float = 30.0  # seconds in which a job that is resized stands still
    restart: float = 1800.0  # seconds until a job that ran out of memory is submitted again
    checkpoint: float = 1800.0  # seconds between two checkpoints
    memory_margin: float = 1.2  # over predicted memory
    needed: int = 5  # finished jobs, before new ones begin with what these needed

    def begin(self, job: Job, finished: list[int]) -> tuple[int, float]:
        """(workers, GB) that a job is admitted with.

        Args:
            finished: last sizes of finished jobs.
        """
        if not self.resizes or len(finished) < self.needed:
            return job.workers, job.memory
        return round(statistics.median(finished)), job.memory


MANUAL = Policy(resizes=False)
MEASURED = Policy(resizes=True, restart=120.0, checkpoint=60.0)  # restarted at once, from copies in memory
