"""Offloading in several processes changes nothing: bit by bit the losses, norms, weights and moments of the same plan without it."""

from __future__ import annotations

import json
import os
import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from drawn import SEED
from spread import PROCESSES, engine, join, joined, through_disk, train

from luban.core.plan import ParallelPlan
from luban.parallel.world import World

STEPS = 3
SPREAD = [  # family, plan, where its state goes
    ("decoder", {"shard": 4}, "cpu"),
    ("uneven", {"shard": 4, "zero": 2}, "cpu"),
    ("uneven", {"shard": 4, "zero": 2}, "disk"),
    ("uneven", {"shard": 4, "zero": 1}, "cpu"),
    ("decoder", {"shard": 2, "replicate": 2, "zero": 1}, "disk"),
    ("uneven", {"shard": 2, "replicate": 2}, "cpu"),
    ("uneven", {"shard": 2, "tensor": 2, "zero": 2}, "cpu"),
    ("uneven", {"shard": 2, "tensor": 2, "zero": 3, "remat": "full"}, "cpu"),
    ("decoder", {"shard": 2, "context": 2, "zero": 2, "remat": "selective"}, "disk"),
    ("uneven", {"tensor": 4}, "cpu"),
    ("uneven", {"tensor": 2, "pipeline": 2, "microbatches": 2}, "disk"),
    ("uneven", {"pipeline": 2, "shard": 2, "microbatches": 2}, "cpu"),
    ("uneven", {"pipeline": 4, "microbatches": 4}, "cpu"),
    ("uneven", {"pipeline": 2, "tensor": 2, "microbatches": 2, "schedule": "interleaved"}, "cpu"),
    ("late-mixture", {"shard": 4, "zero": 2}, "cpu"),
    ("late-mixture", {"shard": 4, "zero": 1, "expert": 2}, "disk"),
    ("late-mixture", {"tensor": 2, "pipeline": 2, "expert": 2, "microbatches": 2}, "cpu"),
]
PRECISIONS = ["fp64", "fp32", "bf16", "fp16"]


def differing(name: str, fields: dict, offload: str, folder: str, precision: str) -> list[str]:
    """What differs between a plan and the same plan offloaded."""
    plan = ParallelPlan(**fields)
    away = ParallelPlan(**fields, offload=offload, offload_folder=folder if offload == "disk" else "")
    engines = [engine(name, p, joined(p), precision=precision) for p in (plan, away)]
    curves = [train(each, name, 0, STEPS) for each in engines]
    states = [each.state_dict() for each in engines]
    found = [f"step {n}" for n, pair in enumerate(zip(*curves, strict=True)) if pair[0] != pair[1]]
    for part in ("model", "optimizer"):
        assert states[0][part].keys() == states[1][part].keys()
        found += [n for n, tensor in states[0][part].items() if not torch.equal(tensor, states[1][part][n])]
    return found


EXACT = list(product(SPREAD, PRECISIONS))
RESUMED = [  # a plan that stops half-way, one that goes on from its checkpoint: both offloaded, or one of them
    ("uneven", {"shard": 4, "zero": 2, "offload": "cpu"}, {"shard": 2, "tensor": 2, "offload": "cpu"}),
    ("uneven", {"shard": 4, "offload": "cpu"}, {"offload": "cpu"}),
    ("decoder", {"offload": "cpu"}, {"shard": 2, "replicate": 2, "zero": 1, "offload": "cpu"}),
    ("uneven", {"tensor": 2, "pipeline": 2, "offload": "cpu", "offload_weights": "cpu"}, {"shard": 4, "zero": 1}),
    ("uneven", {"pipeline": 2, "shard": 2, "offload": "cpu"}, {"shard": 4, "zero": 2, "offload": "disk"}),
]


def resumed(name: str, first: dict, second: dict, folder: str) -> float:
    """How far losses, norms, weights and moments are from those of one process that nothing interrupts."""
    plans = []
    for fields in (first, second):
        plans.append(ParallelPlan(**fields, offload_folder=folder if fields.get("offload") == "disk" else ""))
    engines = [engine(name, p, World() if p.processes == 1 else joined(p)) for p in plans]
    curve = train(engines[0], name, 0, STEPS // 2)
    through_disk(*engines, name)
    curve += train(engines[1], name, STEPS // 2, STEPS)
    right = engine(name, ParallelPlan(), World())
    expected = train(right, name, 0, STEPS)
    ours, theirs = engines[1].state_dict(), right.state_dict()
    errors = [float(np.abs(np.array(curve) / np.array(expected) - 1).max())]
    for part in ("model", "optimizer"):
        assert ours[part].keys() == theirs[part].keys()
        errors += [
            float((ours[part][n] - value).norm() / value.norm().clamp_min(1e-3)) for n, value in theirs[part].items()
        ]
    return max(errors)


def delayed(folder: str) -> bool:
    """Whether delayed updates in four processes are those of one process, and the same whatever is on the disk."""
    found = []
    for fields in (
        {},
        {"shard": 4, "zero": 2},
        {"shard": 4, "zero": 2, "offload": "disk", "offload_gradients": "disk"},
    ):
        fields = {"offload": "cpu", "offload_delay": True, **fields}
        plan = ParallelPlan(**fields, offload_folder=folder if fields["offload"] == "disk" else "")
        each = engine("uneven", plan, joined(plan) if plan.processes > 1 else World())
        each.optimizer.warm_up = 1
        found.append(np.array(train(each, "uneven", 0, STEPS)))
    return bool(np.allclose(found[1], found[0], rtol=1e-9, atol=0) and np.array_equal(found[1], found[2]))


def worker(rank: int, folder: str, exact: list, others: list) -> None:
    join(rank, folder)
    found = {
        "exact": [differing(*case, folder, precision) for case, precision in exact],
        "resumed": [resumed(*case, folder) for case in others],
        "delayed": delayed(folder),
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def check(folder: Path, exact: list, others: list) -> None:
    warm.processes(worker, PROCESSES, str(folder), exact, others)
    for rank in range(PROCESSES):
        found = json.loads((folder / f"{rank}.json").read_text())
        for case, wrong in zip(exact, found["exact"], strict=True):
            assert not wrong, (rank, case, wrong[:5])
        for case, error in zip(others, found["resumed"], strict=True):
            assert error < 1e-9, (rank, case, error)
        assert found["delayed"]
    assert not [name for name in os.listdir(folder) if "luban-offload" in name]  # files have no name, so nothing stays


def test_plans_equal_those_without_offloading_and_go_on_from_each_other(tmp_path):
    draw = random.Random(SEED)
    check(tmp_path, draw.sample(EXACT, 3), draw.sample(RESUMED, 1))


@pytest.mark.slow
def test_every_plan(tmp_path):
    check(tmp_path, EXACT, RESUMED)
