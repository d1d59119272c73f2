"""All plans of a model over a cluster, the fastest that fit first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf
from typing import Literal

from luban.core.errors import ConfigError, UnsupportedError
from luban.core.plan import ParallelPlan, Remat, Schedule
from luban.core.units import bytes_
from luban.planner.cluster import Cluster
from luban.planner.search.estimate import Candidate, Estimate, Workload

ROWS = (1, 2, 4, 8, 16, 32)  # of a micro-batch that are tried
REMATS: tuple[Remat, ...] = ("none", "selective", "full")
STAGES_EACH = (2, 3, 4)  # groups of layers a process that the interleaved schedule is tried with


@dataclass(frozen=True, kw_only=True)
class Space:
    """Which plans are tried.

    Args:
        heads: query heads, which the axis tensor divides; layers: which the pipeline divides; experts: of the smallest mixture.
    """

    heads: int
    layers: int
    experts: int = 0
    context: bool = True  # rows may be divided
    most_tensor: int = 8
    remats: Sequence[Remat] = REMATS

    def plans(self, gpus: int, gpus_per_node: int) -> Iterator[ParallelPlan]:
        """Every division of so many GPUs, without micro-batches."""
        tensors = [t for t in _divisors(gpus) if t <= min(self.most_tensor, gpus_per_node) and self.heads % t == 0]
        for tensor in tensors:
            pipelines = [p for p in _divisors(gpus // tensor) if p <= self.layers]
            for pipeline, context in product(pipelines, (1, 2, 4, 8) if self.context else (1,)):
                readers, rest = divmod(gpus, tensor * pipeline * context)
                if rest or not readers:
                    continue
                for replicate, shard, zero in _data_axes(readers, gpus_per_node // min(tensor, gpus_per_node)):
                    for expert in self._experts(shard * context * tensor):
                        yield ParallelPlan(
                            replicate=replicate,
                            shard=shard,
                            zero=zero,
                            tensor=tensor,
                            context=context,
                            pipeline=pipeline,
                            expert=expert,
                        )

    def _experts(self, processes: int) -> list[int]:
        if not self.experts:
            return [1]
        return [e for e in _divisors(processes) if self.experts % e == 0]


def _data_axes(readers: int, in_node: int) -> Iterator[tuple[int, int, Literal[1, 3]]]:
    """(replicate, shard, zero) over so many readers: copies; ZeRO 1 and 3 over all, or inside of a node."""
    yield readers, 1, 3
    for shard in sorted({readers, min(readers, max(in_node, 1))} - {1}):
        if readers % shard == 0:
            yield readers // shard, shard, 1
            yield readers // shard, shard, 3


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def candidates(space: Space, workload: Workload, cluster: Cluster) -> Iterator[Candidate]:
    """Every plan with every size of micro-batches that divides the batch, and every policy of rematerialisation."""
    for plan in space.plans(cluster.gpus, cluster.gpus_per_node):
        if workload.batch % plan.readers or (plan.context > 1 and workload.seq % (2 * plan.context)):
            continue
        each = workload.batch // plan.readers
        for rows, remat in product((r for r in ROWS if each % r == 0), space.remats):
            number = each // rows
            for schedule, stages_each in _schedules(plan, number, space.layers):
                pieces = {"microbatches": number} if plan.pipeline > 1 else {}
                changed = {**vars(plan), **pieces, "remat": remat, "schedule": schedule, "interleave": stages_each}
                yield Candidate(plan=ParallelPlan(**changed), accumulate=number, rows=rows)


def _schedules(plan: ParallelPlan, number: int, layers: int) -> Iterator[tuple[Schedule, int]]:
    yield "1f1b", 2
    if plan.pipeline > 1 and number % plan.pipeline == 0:
        for each in STAGES_EACH:
            if plan.pipeline * each <= layers:
                yield "interleaved", each


def best_plans(space: Space, workload: Workload, cluster: Cluster, top: int = 10) -> list[Estimate]:
    """The fastest plans that fit, of each division of the GPUs the best.

    Raises:
        ConfigError: no plan divides the batch.
        UnsupportedError: none fits into memory; the message says what would.
    """
    found: dict[tuple[int, ...], Estimate] = {}
    leanest, least = None, inf
    for candidate in candidates(space, workload, cluster):
        memory, plan = workload.memory(candidate), candidate.plan
        if memory < least:
            leanest, least = candidate, memory
        if memory > cluster.memory_bytes:
            continue
        estimate = workload.estimate(candidate)
        key = (*plan.sizes, plan.zero_stage if plan.shard > 1 else 0, plan.expert)
        if key not in found or estimate.seconds < found[key].seconds:
            found[key] = estimate
    if leanest is None:
        raise ConfigError(
            f"no plan over {cluster.gpus} GPUs divides a batch of {workload.batch} rows evenly: use a multiple of "
            f"{cluster.gpus}, such as --train.batch_size {max(round(workload.batch / cluster.gpus), 1) * cluster.gpus}"
        )
    if not found:
        raise UnsupportedError(_nowhere(leanest, least, space, workload, cluster))
    return sorted(found.values(), key=lambda estimate: estimate.seconds)[:top]


def _nowhere(leanest: Candidate, needed: float, space: Space, workload: Workload, cluster: Cluster) -> str:
    """What a model that fits nowhere would need."""
    has = bytes_(cluster.memory_bytes)
    text = (
        f"the model fits into no plan over {cluster.gpus} × {cluster.gpu}: the leanest needs {bytes_(needed)} a GPU "
        f"({described(leanest)}), and {has} may be used"
    )
    for factor in (2, 4, 8, 16, 32, 64):
        larger = Cluster(
            **{**vars(cluster), "nodes": cluster.nodes * factor, "between": cluster.network, "topology": None}
        )
        least = min(
            (workload.memory(c) for c in candidates(space, workload, larger) if c.rows == 1 and c.plan.remat == "full"),
            default=inf,
        )
        if least <= cluster.memory_bytes:
            return f"{text}: {larger.nodes} nodes ({larger.gpus} GPUs) would do, or GPUs with {bytes_(needed)}"
    return f"{text}: GPUs with that much memory would do, or a smaller model"


def described(candidate: Candidate) -> str:
    """A candidate in a few words."""
    plan = candidate.plan
    axes = [
        f"{axis} {getattr(plan, axis)}" for axis in ("tensor", "context", "shard", "replicate", "pipeline", "expert")
    ]
    words = [text for text in axes if not text.endswith(" 1")] or ["one process"]
    words += [f"zero {plan.zero_stage}"] * (plan.shard > 1)
    words += [f"{plan.schedule}{f' of {plan.interleave}' * (plan.schedule == 'interleaved')}"] * (plan.pipeline > 1)
    return ", ".join([*words, f"{candidate.accumulate} micro-batches of {candidate.rows}", f"remat {plan.remat}"])
