"""Adapters under a plan of two processes: losses and what is trained are those of one process, in float64 over Gloo."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import FAMILIES, packed_batch

from luban.adapters.base import AdapterConfig, rates_of
from luban.adapters.lora import LoRA
from luban.adapters.pissa import PiSSA
from luban.adapters.series import Houlsby
from luban.core.plan import ParallelPlan
from luban.models.build import build_model, state_of
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.apply import Execution, apply
from luban.parallel.engine import TrainEngine
from luban.parallel.world import World

PLANS = [{"shard": 2}, {"shard": 2, "zero": 1}, {"replicate": 2}, {"pipeline": 2, "microbatches": 2}]
KINDS: list[AdapterConfig] = [LoRA(rank=3, rate_ratio=4.0), PiSSA(rank=2), Houlsby(width=4)]
SPEC = FAMILIES["decoder"].spec


def engine(config: AdapterConfig, plan: ParallelPlan, world: World) -> TrainEngine:
    weights = state_of(build_model(SPEC, seed=3, dtype="float64"))
    return apply(
        Causal().loss(build_model(SPEC, device="meta")),
        plan,
        AdamW(lr=1e-2, eps=1e-4),
        execution=Execution(device=torch.device("cpu"), precision="fp64", accumulate=2, world=world),
        init=weights | config.initial(SPEC, weights, 5),
        adapt=config.adapt,
        rates=rates_of,
    )


def trained(made: TrainEngine) -> tuple[list[float], dict[str, torch.Tensor]]:
    curve = [made.step(packed_batch(8, np.random.default_rng([7, step]))).loss for step in range(3)]
    return curve, made.state_dict()["model"]


def process(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = []
    for config in KINDS:
        curve, weights = trained(engine(config, ParallelPlan(), World()))
        for fields in PLANS:
            plan = ParallelPlan(**fields)
            losses, mine = trained(engine(config, plan, World.join(plan, torch.device("cpu"))))
            assert mine.keys() == weights.keys(), (config, fields)
            off = max(float((mine[n] - w).norm() / w.norm().clamp_min(1e-3)) for n, w in weights.items())
            found.append((fields, type(config).__name__, float(np.abs(np.subtract(losses, curve)).max()), off))
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_train_what_one_does(tmp_path: Path):
    mp.spawn(process, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "0")
    assert len(found) == len(PLANS) * len(KINDS)
    assert not [one for one in found if one[2] > 1e-9 or one[3] > 1e-7], found
