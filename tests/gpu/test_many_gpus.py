"""Plans over the GPUs of one machine, through NCCL, give the curve of one process."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from families import FAMILIES, Family, engine_of

from luban.core.plan import ParallelPlan
from luban.parallel.world import World

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs several CUDA GPUs")]
HOST = {"offload": "cpu"}
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"shard": GPUS, "zero": 1}, {"accumulate": 2}),
    ({"shard": GPUS, "zero": 2}, {"accumulate": 2}),
    ({"shard": GPUS, "zero": 2}, {"precision": "bf16"}),
    ({"shard": GPUS, "zero": 2}, {"precision": "bf16", "compile": True}),
    ({"shard": GPUS}, {"accumulate": 2}),
    ({"replicate": GPUS}, {}),
    ({"tensor": 2, "shard": GPUS // 2, "zero": 2}, {}),
    ({"shard": GPUS, "zero": 1, **HOST}, {"accumulate": 2}),
    ({"shard": GPUS, "zero": 2, **HOST}, {"precision": "bf16", "accumulate": 2}),
    ({"shard": GPUS, **HOST}, {"precision": "bf16"}),
    ({"tensor": GPUS, **HOST, "offload_weights": "cpu"}, {"precision": "bf16"}),
    ({"pipeline": 2, "shard": GPUS // 2, "microbatches": 2, "schedule": "interleaved"}, {"family": "t5"}),
]
STEPS, ROWS = 6, 8
NEAR = {"fp32": 1e-4, "bf16": 2e-2}


def family_of(name: str) -> Family:
    """With layers for four stages."""
    found = FAMILIES[name]
    if name == "decoder":
        return found
    deep = replace(found.spec, encoder=found.spec.encoder[:1] * 2, layers=found.spec.layers[:1] * 2)
    return replace(found, spec=deep)


def curve(
    plan: ParallelPlan, world: World, device: torch.device, family: str = "decoder", **execution
) -> list[tuple[float, float]]:
    settings = {"precision": "fp32", "clip": 0.5, "eps": 1e-4, **execution}
    engine = engine_of(family_of(family), seed=3, plan=plan, world=world, device=device, **settings)
    found = []
    for step in range(STEPS):
        result = engine.step(FAMILIES[family].batch(ROWS, np.random.default_rng(step)))
        found.append((result.loss, result.grad_norm))
    return found


def worker(rank: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    os.environ.update(WORLD_SIZE=str(GPUS), RANK=str(rank))
    store = f"file://{folder}/store"
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=GPUS, device_id=device)
    found = []
    for fields, execution in CASES:
        plan = ParallelPlan(**fields)
        several = curve(plan, World.join(plan, device), device, **execution)
        found.append((several, curve(ParallelPlan(), World(), device, **execution)))
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_plans_over_nccl_give_the_curve_of_one_process(tmp_path):
    warm.processes(worker, GPUS, str(tmp_path))
    for rank in range(GPUS):
        for (fields, execution), (several, one) in zip(
            CASES, json.loads((tmp_path / f"{rank}.json").read_text()), strict=True
        ):
            near = NEAR[execution.get("precision", "fp32")]
            assert np.abs(np.array(several) / np.array(one) - 1).max() < near, (fields, execution, several, one)
