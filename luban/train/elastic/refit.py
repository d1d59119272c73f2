"""A plan fitted to another number of workers at the same global batch. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, replace

from luban.core.plan import ParallelPlan


@dataclass(frozen=True)
class Fitted:
    """What a generation of workers runs."""

    plan: ParallelPlan
    accumulate: int  # micro-batches a step


def usable_workers(plan: ParallelPlan, batch_size: int, workers: int) -> int:
    """How many of the workers a plan can use: every one that reads rows needs at least one of a batch, and replicas of a model
    that `plan.shard` processes hold take whole multiples of them."""
    workers = min(workers, batch_size)
    if plan.shard > 1 and plan.replicate > 1 and workers > plan.shard:
        return workers - workers % plan.shard
    return workers


def refit(plan: ParallelPlan, batch_size: int, accumulate: int, workers: int) -> Fitted:
    """The plan over so many workers, of which it can use all (`usable_workers`).

    Replicas follow the number of workers; shards do where there is one copy, or where fewer workers are left than hold one.
    `accumulate` becomes the smallest divisor of the batch with which no worker computes more rows at once than under the given
    plan, as long as every worker has a row.
    """
    if plan.shard == 1:
        fitted = replace(plan, replicate=workers)
    elif plan.replicate == 1 or workers < plan.shard:
        fitted = replace(plan, replicate=1, shard=workers)
    else:
        fitted = replace(plan, replicate=workers // plan.shard)
    if fitted.readers == plan.readers:
        return Fitted(fitted, accumulate)
    at_once = -(-batch_size // (accumulate * plan.readers))
    able = [n for n in range(1, batch_size + 1) if batch_size % n == 0 and batch_size // n >= workers]
    small = [n for n in able if -(-batch_size // (n * workers)) <= at_once]
    return Fitted(fitted, small[0] if small else able[-1])


def keeps_parts(before: ParallelPlan, now: ParallelPlan) -> bool:
    """Whether model and optimizer made for one plan of a run serve another one, among other processes.

    Shards and messages between replicas are laid out when they are made, and `plan.remat pofo` has all processes measure at the same
    moment. A worker alone sends no messages.
    """
    if max(before.shard, now.shard) > 1 or (before.replicate > 1) != (now.replicate > 1):
        return False
    return now.replicate == 1 or now.remat != "pofo"
