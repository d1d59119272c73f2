"""`luban bench jobs`: completion times of misconfigured jobs, in simulation."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from luban.core.arguments import parse

ABOUT = """Jobs whose owners guessed what they need, on a shared cluster: completion times with the resources that were requested,
and resized by what each job measures of itself (DLRover, Wang et al. 2023). Simulated, from drawn jobs; docs/ELASTIC.md."""
EXAMPLES = """
luban bench jobs
luban bench jobs --spread 0.35 --memory-spread 0.2 --seeds 5
luban bench jobs --out jobs.html --json jobs.json
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    jobs: int = 120  # a simulation
    hours: float = 12.0  # in which they arrive
    spread: float = 0.7  # standard deviation of the logarithm of requested over right workers (0: all are right)
    memory_spread: float = 0.4  # the same of memory
    workers: int = 160  # that the cluster can run at once
    memory: float = 8000.0  # GB that it has
    seeds: int = 3  # simulations
    seed: int = 0  # of the first
    out: Path | None = None  # an HTML page with the distribution
    json: Path | None = None  # figures and every completion time


def run(argv: Sequence[str]) -> None:
    """Simulate and print."""
    args = parse(Arguments, argv, verb="bench jobs", about=ABOUT, examples=EXAMPLES)
    from luban.core.artifact import atomic_write
    from luban.core.errors import UsageError
    from luban.core.log import print_result
    from luban.planner.jobs.job import Workload
    from luban.planner.jobs.results import compare_policies
    from luban.planner.jobs.simulation import JobCluster

    if min(args.jobs, args.workers, args.seeds) < 1 or min(args.hours, args.memory) <= 0:
        raise UsageError("--jobs, --workers and --seeds must be at least 1, --hours and --memory above 0")
    if min(args.spread, args.memory_spread) < 0:
        raise UsageError("--spread and --memory-spread must be at least 0")
    workload = Workload(
        jobs=args.jobs, hours=args.hours, seed=args.seed, spread=args.spread, memory_spread=args.memory_spread
    )
    found = compare_policies(workload, JobCluster(workers=args.workers, memory=args.memory), args.seeds)
    print_result(f"{'requests':<14}{'mean h':>8}{'median h':>10}{'p90 h':>8}{'useful':>8}{'out of memory':>15}")
    for each in found:
        print_result(
            f"{each.policy:<14}{each.mean_hours:>8.2f}{each.median_hours:>10.2f}{each.p90_hours:>8.2f}{each.useful:>8.0%}"
            f"{each.out_of_memory:>15}"
        )
    mean, median = (1 - getattr(found[1], name) / getattr(found[0], name) for name in ("mean_hours", "median_hours"))
    changes = (
        f"{name} {abs(less):.0%} {'lower' if less >= 0 else 'higher'}"
        for name, less in (("mean", mean), ("median", median))
    )
    print_result(f"completion times: {', '.join(changes)}")
    if args.json is not None:
        atomic_write(args.json, json.dumps([asdict(each) for each in found], indent=1))
    if args.out is not None:
        from luban.report.jobs import completion_page

        about = f"{args.seeds} simulations of {args.jobs} jobs: luban bench jobs {shlex.join(argv)}"
        atomic_write(args.out, completion_page(found, about))
