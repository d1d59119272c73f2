"""A cluster that runs jobs first come, first served, in simulated seconds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from luban.core.errors import UsageError
from luban.planner.jobs.job import Job
from luban.planner.jobs.policy import Measurements, Policy

NOISE = 0.03  # standard deviation of a measured iteration time, relative


@dataclass(frozen=True, kw_only=True)
class JobCluster:
    """What jobs share."""

    workers: int = 160  # that fit at once
    memory: float = 8000.0  # GB


@dataclass
class Run:
    """A job while it is in the cluster."""

    job: Job
    workers: int
    memory: float
    queued: float  # since when it waits
    done: float = 0.0  # iterations
    saved: float = 0.0  # of them in its last checkpoint
    next_save: float = 0.0
    stands_until: float = 0.0
    next_look: float = 0.0
    measured: Measurements = field(default_factory=Measurements)
    wanted: int = 0  # workers, at the last look
    failures: int = 0  # for lack of memory
    finished: float | None = None

    @property
    def share(self) -> float:
        """Of its iterations that are done."""
        return self.done / self.job.iterations

    def seconds_to(self, iterations: float) -> float:
        """Until so many are done at the present size."""
        return max(iterations - self.done, 0.0) * self.job.time.seconds(self.workers)

    def iterations_that_fit(self) -> float:
        """How many can be done before its memory is full; as many as there are, or more: all."""
        grows = self.job.memory_end - self.job.memory_start
        if self.job.memory_end <= self.memory:
            return float(self.job.iterations)
        return max(self.job.iterations * (self.memory - self.job.memory_start) / grows, 0.0)


@dataclass
class Outcome:
    """What became of the jobs."""

    runs: list[Run]
    worker_seconds: float = 0.0  # taken by jobs
    useful_seconds: float = 0.0  # of these, what an efficient worker would have needed
    most_workers: int = 0  # in use at once
    most_memory: float = 0.0

    def completion_times(self) -> list[float]:
        """Seconds from each job's arrival to its end, by job."""
        return [run.finished - run.job.arrives for run in self.runs if run.finished is not None]


class Simulation:
    """Runs jobs under a policy.

    Args:
        seed: of the noise of measurements.

    Raises UsageError for a job that needs more memory than the cluster has: it would never end.
    """

    def __init__(self, jobs: Sequence[Job], cluster: JobCluster, policy: Policy, seed: int = 0):
        largest = max((job.memory_end for job in jobs), default=0.0)
        if largest > cluster.memory:
            raise UsageError(
                f"a job needs {largest:.0f} GB and the cluster has {cluster.memory:.0f}, so it would never end: more memory, or fewer "
                "jobs"
            )
        self.cluster, self.policy, self.draw = cluster, policy, random.Random(seed)
        self.arriving = sorted(jobs, key=lambda job: job.arrives)
        self.waiting: list[Run] = []
        self.running: list[Run] = []
        self.last_sizes: list[int] = []
        self.now = 0.0
        self.outcome = Outcome([])

    def run(self) -> Outcome:
        """Until all jobs are done."""
        while self.arriving or self.waiting or self.running:
            self._advance(self._next())
            self._arrive()
            self._finish()
            if self.policy.resizes:
                self._look()
            self._admit()
            if self.policy.resizes and not self._queue():
                self._grow()
        return self.outcome

    def free(self) -> tuple[int, float]:
        """(workers, GB) that no job has."""
        return (
            self.cluster.workers - sum(run.workers for run in self.running),
            self.cluster.memory - sum(run.memory for run in self.running),
        )

    def _next(self) -> float:
        """When something happens next."""
        times = [job.arrives for job in self.arriving[:1]]
        times += [run.queued for run in self.waiting if run.queued > self.now]
        for run in self.running:
            start = max(self.now, run.stands_until)
            times.append(start + run.seconds_to(min(float(run.job.iterations), run.iterations_that_fit())))
            if self.policy.resizes:
                times.append(max(run.next_look, self.now))
        return min(times)

    def _advance(self, to: float) -> None:
        for run in self.running:
            works = max(to - max(self.now, run.stands_until), 0.0)
            seconds = run.job.time.seconds(run.workers)
            while run.next_save <= to:
                run.saved = run.done + max(run.next_save - max(self.now, run.stands_until), 0.0) / seconds
                run.next_save += self.policy.checkpoint
            run.done = min(run.done + works / seconds, float(run.job.iterations))
            self.outcome.worker_seconds += (to - self.now) * run.workers
            self.outcome.useful_seconds += works * run.workers * min(run.job.time.efficiency(run.workers), 1.0)
        self.now = to

    def _arrive(self) -> None:
        while self.arriving and self.arriving[0].arrives <= self.now:
            job = self.arriving.pop(0)
            workers, memory = self.policy.begin(job, self.last_sizes)
            workers, memory = min(workers, self.cluster.workers), min(memory, self.cluster.memory)
            self.waiting.append(Run(job, workers, memory, job.arrives))
            self.outcome.runs.append(self.waiting[-1])

    def _finish(self) -> None:
        for run in list(self.running):
            if run.done >= run.job.iterations * (1 - 1e-9):
                run.finished = self.now
                self.running.remove(run)
                self.last_sizes.append(run.workers)
            elif run.done >= run.iterations_that_fit() * (1 - 1e-9):
                self._out_of_memory(run)

    def _out_of_memory(self, run: Run) -> None:
        """A job goes back to its last checkpoint, and comes back with twice the memory."""
        run.done = run.saved
        run.memory = min(2 * run.memory, self.cluster.memory)
        run.failures += 1
        run.queued = self.now + self.policy.restart
        run.measured.memory.clear()
        self.running.remove(run)
        self.waiting.append(run)

    def _queue(self) -> list[Run]:
        """Jobs that could start, the longest waiting first."""
        return sorted((run for run in self.waiting if run.queued <= self.now), key=lambda run: run.queued)

    def _admit(self) -> None:
        for run in self._queue():
            workers, memory = self.free()
            if self.policy.resizes and workers:  # one that can grow later may start with what there is
                run.workers = min(run.workers, workers)
            if run.workers > workers or run.memory > memory:
                return  # first come, first served: those behind wait, too
            self.waiting.remove(run)
            self.running.append(run)
            run.next_look, run.next_save = self.now + self.policy.interval, self.now + self.policy.checkpoint
            self._note_use()

    def _look(self) -> None:
        """Measure jobs whose time has come, and take from them what they don't need."""
        for run in self.running:
            if run.next_look > self.now:
                continue
            run.next_look = self.now + self.policy.interval
            noisy = run.job.time.seconds(run.workers) * max(1 + self.draw.gauss(0, NOISE), 0.5)
            run.measured.times.setdefault(run.workers, []).append(noisy)
            run.measured.memory.append((run.share, run.job.memory_after(run.share)))
            run.wanted = run.measured.wanted_workers(run.workers)
            if run.wanted < 0.8 * run.workers:
                self._resize(run, run.wanted)
            memory = run.measured.wanted_memory(self.policy.memory_margin)
            if memory is not None and (memory < run.memory or memory - run.memory <= self.free()[1]):
                run.memory = memory
                self._note_use()

    def _grow(self) -> None:
        """Give free workers to jobs that would be faster with them, those with the fewest first."""
        for run in sorted(self.running, key=lambda run: (run.workers, run.job.number)):
            wanted = min(run.wanted, run.workers + self.free()[0])
            if wanted > 1.25 * run.workers:
                self._resize(run, wanted)

    def _resize(self, run: Run, workers: int) -> None:
        run.workers, run.stands_until = workers, self.now + self.policy.pause
        run.next_look = run.stands_until + self.policy.interval
        self._note_use()

    def _note_use(self) -> None:
        self.outcome.most_workers = max(self.outcome.most_workers, sum(run.workers for run in self.running))
        self.outcome.most_memory = max(self.outcome.most_memory, sum(run.memory for run in self.running))
