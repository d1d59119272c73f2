"""Training jobs, and requests for them as people make them."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from luban.planner.jobs.throughput import IterationTime

MOST_WORKERS = 64
EFFICIENT = 0.5  # of a worker, below which another one is a waste


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job; what it needs is known to nobody before it runs."""

    number: int
    arrives: float  # seconds
    iterations: int
    time: IterationTime
    memory_start: float  # GB, of all workers together, at its start
    memory_end: float  # and at its end: tables grow with the data
    workers: int  # requested
    memory: float  # GB requested

    def memory_after(self, done: float) -> float:
        """GB in use after a share of its iterations."""
        return self.memory_start + (self.memory_end - self.memory_start) * done

    @property
    def right_workers(self) -> int:
        """What should have been requested."""
        return self.time.right_size(EFFICIENT, MOST_WORKERS)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """How jobs are drawn. Requests are wrong by log-normal factors, as people who guess are."""

    jobs: int = 120
    hours: float = 12.0  # in which they arrive
    seed: int = 0
    spread: float = 0.7  # standard deviation of the logarithm of requested over right workers (0: all are right)
    memory_spread: float = 0.4  # the same of memory
    memory_margin: float = 1.3  # median of requested memory over what is needed

    def draw(self) -> list[Job]:
        """The jobs, by arrival."""
        draw = random.Random(self.seed)
        arrivals = sorted(draw.uniform(0, 3600 * self.hours) for _ in range(self.jobs))
        return [self._job(draw, number, at) for number, at in enumerate(arrivals)]

    def _job(self, draw: random.Random, number: int, at: float) -> Job:
        divided = draw.lognormvariate(math.log(4.0), 0.7)
        time = IterationTime(draw.uniform(0.01, 0.08) * divided, divided, draw.uniform(0.0005, 0.006) * divided)
        right = time.right_size(EFFICIENT, MOST_WORKERS)
        hours = draw.lognormvariate(math.log(0.8), 0.7)  # at the right size
        end = draw.lognormvariate(math.log(60.0), 0.6)
        return Job(
            number=number,
            arrives=at,
            iterations=max(int(3600 * hours / time.seconds(right)), 1),
            time=time,
            memory_start=end * draw.uniform(0.3, 0.9),
            memory_end=end,
            workers=min(max(round(right * math.exp(draw.gauss(0, self.spread))), 1), MOST_WORKERS),
            memory=end * self.memory_margin * math.exp(draw.gauss(0, self.memory_spread)),
        )
