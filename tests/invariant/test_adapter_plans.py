"""Adapters under a plan of two processes: losses and what is trained are those of one process, in float64 over Gloo."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from families import FAMILIES, packed_batch

from luban.adapters.base import AdapterConfig, rates_of
from luban.adapters.dora import DoRA
from luban.adapters.llama_adapter import LLaMAAdapter
from luban.adapters.lora import LoRA
from luban.adapters.parallel import Parallel
from luban.adapters.pissa import PiSSA
from luban.adapters.prefix import PrefixTuning
from luban.adapters.prompt import PromptTuning
from luban.adapters.series import Houlsby
from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.models.build import build_model, state_of
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.apply import Execution, apply
from luban.parallel.engine import TrainEngine
from luban.parallel.world import World

PLANS = [{"shard": 2}, {"shard": 2, "zero": 1}, {"replicate": 2}, {"pipeline": 2, "microbatches": 2}, {"context": 2}]
LORA = LoRA(rank=3, rate_ratio=4.0, modules_to_save=("embedding",))
CASES: list[tuple[AdapterConfig, dict]] = [
    *[(LORA, plan) for plan in PLANS],
    (DoRA(rank=3), {"shard": 2}),
    (PiSSA(rank=2), {"shard": 2, "zero": 1}),
    (LLaMAAdapter(length=3), {"shard": 2}),
    (Parallel(width=4), {"pipeline": 2, "microbatches": 2}),
    (Houlsby(width=4), {"pipeline": 2, "microbatches": 2}),
    (PrefixTuning(length=3, network=8), {"shard": 2}),
    (PromptTuning(length=3), {"replicate": 2}),
]
REFUSED = [
    (PromptTuning(length=3), {"shard": 2}, "plan.shard: use --plan.replicate"),
    (PromptTuning(length=3), {"pipeline": 2}, "plan.pipeline: use --plan.replicate"),
    (PrefixTuning(length=3, network=8), {"context": 2}, "plan.context: use --plan.shard or --plan.replicate"),
    (LoRA(rank=3), {"tensor": 2}, "adapters do not go with plan.tensor"),
    (LoRA(rank=3, base="nf4"), {"shard": 2}, "packed weights .* do not go with plan.shard"),
]
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
        pack=None if config.base == "float" else config.pack_base,
    )


def trained(made: TrainEngine) -> tuple[list[float], dict[str, torch.Tensor]]:
    curve = [made.step(packed_batch(8, np.random.default_rng([7, step]))).loss for step in range(2)]
    return curve, made.state_dict()["model"]


def process(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = []
    joined = cache(lambda **fields: World.join(ParallelPlan(**fields), torch.device("cpu")))
    alone = cache(lambda config: trained(engine(config, ParallelPlan(), World())))
    for config, fields in CASES:
        losses, mine = trained(engine(config, ParallelPlan(**fields), joined(**fields)))
        curve, weights = alone(config)
        assert mine.keys() == weights.keys(), (config, fields)
        off = max(float((mine[n] - w).norm() / w.norm().clamp_min(1e-3)) for n, w in weights.items())
        found.append((type(config).__name__, fields, float(np.abs(np.subtract(losses, curve)).max()), off))
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_train_what_one_does(tmp_path: Path):
    warm.processes(process, 2, str(tmp_path))
    for rank in ("0", "1"):
        found = torch.load(tmp_path / rank)
        assert len(found) == len(CASES)
        assert not [one for one in found if one[2] > 1e-9 or one[3] > 1e-9], found


@pytest.mark.parametrize("config, fields, reason", REFUSED)
def test_what_plans_can_not_spread_is_refused(config, fields, reason):
    plan = ParallelPlan(**fields)
    with pytest.raises(ConfigError, match=reason):
        engine(config, plan, World(plan))
