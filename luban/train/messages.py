"""The messages of a plan, each measured alone and predicted in three ways, for a run with `--train.profile`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from luban.core.errors import LubanError
from luban.core.log import warn
from luban.parallel.bench import Row, measure
from luban.parallel.world import World
from luban.planner.collective_times import SWEEPS, Links, fit

# as `luban.planner.traffic` calls them
NAMES = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
}
AXES = ("replicate", "shard", "tensor", "expert")
FITTED = {"cuda": (1 << 20, 1 << 23, 1 << 26), "cpu": (1 << 16, 1 << 20, 1 << 22)}  # bytes of all-reduces
LARGEST = {"cuda": 1 << 28, "cpu": 1 << 24}  # bytes of one message; what is more is measured as one of this size
REPEATS = 5


def messages_of(figures: Mapping[str, Any], world: World, device: torch.device) -> list[dict[str, Any]]:
    """Those of a run, by the figures of its manifest that the main process has; every process must call it."""
    return measured_messages(world, world.agree(figures.get("predicted_messages", [])), device)


def measured_messages(world: World, rows: Sequence[Mapping[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Seconds of each message, and what constants fitted to all-reduces predict. Every process must call it with the same rows.

    Args:
        rows: of `Prediction.figures()["predicted_messages"]`. Those between stages of a pipeline and round a ring of keys and
            values are left out, since they are no collectives.

    Returns:
        Rows with `processes`, `bytes` of the whole tensor, and seconds under `measured`; those of the main process also under
        `closed form`, `fluid` and `packets`, unless its times of all-reduces can't be fitted (a warning says so).
    """
    found: list[dict[str, Any]] = []
    for axis in AXES:
        wanted = [row for row in rows if row["axis"] == axis and row["collective"] in NAMES]
        group = _group(world, axis) if wanted else None
        if group is None:
            continue
        sizes = FITTED[device.type]
        reduces = measure(["all_reduce"], sizes, device, repeats=REPEATS, group=group)
        links = _fitted(axis, reduces, group.size()) if world.is_main else None
        for row in wanted:
            name, n = NAMES[row["collective"]], group.size()
            sweeps = 1 if name == "all_to_all" else SWEEPS[name]
            size = min(int(row["bytes"] * n / (n - 1) / sweeps), LARGEST[device.type])
            (alone,) = measure([name], [size], device, repeats=REPEATS, group=group)
            predicted = {} if links is None else _predicted(links, name, alone.bytes)
            about = {"axis": axis, "collective": row["collective"], "what": row["what"], "processes": n}
            found.append({**about, "bytes": alone.bytes, "measured": alone.peer_seconds, **predicted})
    return found


def _group(world: World, axis: str) -> dist.ProcessGroup | None:
    """The processes that the messages of an axis go between; None where they are no group of several."""
    if axis == "expert":
        return world.expert_group if world.experts is not None else None
    groups = world.sharing_groups(axis)
    return groups[0] if groups else None


def _fitted(axis: str, reduces: Sequence[Row], processes: int) -> Links | None:
    """None where times don't grow with sizes, as on a machine that is busy with something else."""
    try:
        return fit(processes, [row.bytes for row in reduces], [row.peer_seconds for row in reduces])
    except LubanError as error:
        warn(f"the messages of plan.{axis} aren't predicted: {error}")
        return None


def _predicted(links: Links, name: str, size: int) -> dict[str, float]:
    found = {"closed form": links.closed_form(name, size)}
    try:
        return {**found, "fluid": links.fluid(name, size), "packets": links.packets(name, size)}
    except ImportError:  # the simulator's compiler comes with luban[plan]
        return found
