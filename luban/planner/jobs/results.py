"""Completion times of the same jobs under both policies, and their distribution."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from luban.planner.jobs.job import Workload
from luban.planner.jobs.policy import MANUAL, MEASURED
from luban.planner.jobs.simulation import JobCluster, Outcome, Simulation


@dataclass(frozen=True, kw_only=True)
class PolicyFigures:
    """What a policy came to, over all seeds."""

    policy: str
    mean_hours: float  # from a job's arrival to its end
    median_hours: float
    p90_hours: float
    useful: float  # share of the taken workers' time that an efficient job would have needed
    out_of_memory: int  # how often jobs ran out of memory
    hours: tuple[float, ...]  # of every job, ascending

    @classmethod
    def of(cls, policy: str, outcomes: Sequence[Outcome]) -> PolicyFigures:
        """Of simulations that are over."""
        hours = sorted(seconds / 3600 for outcome in outcomes for seconds in outcome.completion_times())
        taken = sum(outcome.worker_seconds for outcome in outcomes)
        return cls(
            policy=policy,
            mean_hours=statistics.fmean(hours),
            median_hours=statistics.median(hours),
            p90_hours=hours[int(0.9 * (len(hours) - 1))],
            useful=sum(outcome.useful_seconds for outcome in outcomes) / taken,
            out_of_memory=sum(run.failures for outcome in outcomes for run in outcome.runs),
            hours=tuple(hours),
        )


def compare_policies(workload: Workload, cluster: JobCluster, seeds: int) -> tuple[PolicyFigures, PolicyFigures]:
    """Requests as they were made, and resized by what is measured, over the same jobs of so many seeds."""
    found: tuple[list[Outcome], list[Outcome]] = ([], [])
    for seed in range(workload.seed, workload.seed + seeds):
        jobs = replace(workload, seed=seed).draw()
        for outcomes, policy in zip(found, (MANUAL, MEASURED), strict=True):
            outcomes.append(Simulation(jobs, cluster, policy, seed).run())
    return PolicyFigures.of("as requested", found[0]), PolicyFigures.of("as measured", found[1])
