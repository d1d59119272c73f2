"""PipeDream in two processes equals a simulation in one: each stage's forward and backward pass of a micro-batch use the weights
that the schedule's staleness says, and update the newest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from families import FAMILIES, engine_of
from torch.func import functional_call
from training_data import tensors

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.models.build import build_model
from luban.nn.roles import roles_of
from luban.optim.adamw import AdamW
from luban.optim.base import Update
from luban.parallel.world import World
from luban.planner.pipeline.pipedream import staleness

NAME, SEED, ROWS, MICRO_BATCHES, STEPS = "decoder-kerple", 3, 8, 4, 2
PROCESSES = 2
PLAN = {"pipeline": PROCESSES, "microbatches": MICRO_BATCHES, "schedule": "pipedream"}


def family():
    """Two layers and positions without parameters, as stages must share none."""
    from dataclasses import replace

    from luban.nn.position.rope import Rope

    whole = FAMILIES[NAME]
    return replace(whole, spec=replace(whole.spec, position=Rope()))


def batch_of(step: int):
    return family().batch(ROWS, np.random.default_rng([SEED, step]))


def simulated() -> dict[str, torch.Tensor]:
    """The weights after the steps, micro-batch by micro-batch."""
    module = family().objective.loss(build_model(family().spec, dtype="float64", seed=SEED))
    newest = dict(module.model.named_parameters())
    stage_of = {n: int(not (n.startswith(("decoder.embedding", "decoder.blocks.0")))) for n in newest}
    optimizer = AdamW(lr=1e-2, eps=1e-4).build(newest, roles_of(module.model))
    for step in range(STEPS):
        batch = batch_of(step)
        versions = [{n: p.detach().clone() for n, p in newest.items()}]
        for m in range(MICRO_BATCHES):
            met = {n: versions[m - staleness(PROCESSES, stage_of[n], m)][n].clone().requires_grad_() for n in newest}
            part = {n: t.chunk(MICRO_BATCHES)[m] for n, t in tensors(batch).items()}
            loss = functional_call(module, {f"model.{n}": w for n, w in met.items()}, (part,)).sum
            (loss * MICRO_BATCHES / batch.target_count).backward()
            gradients = {newest[n]: w.grad for n, w in met.items() if w.grad is not None}
            optimizer.step(1.0, Update(gradients, torch.ones(()), torch.ones((), dtype=torch.bool)))
            versions.append({n: p.detach().clone() for n, p in newest.items()})
    return {name: parameter.detach() for name, parameter in newest.items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE=str(PROCESSES), RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    plan = ParallelPlan(**PLAN)
    world = World.join(plan, torch.device("cpu"))
    settings = {"precision": "fp64", "clip": 0.0, "eps": 1e-4, "seed": SEED, "plan": plan, "world": world}
    engine = engine_of(family(), **settings)
    results = [engine.step(batch_of(step)) for step in range(STEPS)]
    wanted, found = simulated(), engine.state_dict()["model"]
    errors = {n: float((found[n] - w).norm() / w.norm().clamp_min(1e-3)) for n, w in wanted.items()}
    refused = []
    for changed in ({"clip": 1.0}, {}):
        try:
            engine_of(family() if changed else FAMILIES["decoder"], **settings | changed)
        except ConfigError as error:
            refused.append(str(error))
    Path(folder, f"{rank}.json").write_text(
        json.dumps({"errors": errors, "good": all(not r.bad for r in results), "refused": refused})
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("pipedream")
    warm.processes(worker, PROCESSES, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def test_weights_equal_those_of_the_simulation(ranks):
    for found in ranks:
        assert found["good"] and max(found["errors"].values()) < 1e-9, max(found["errors"].items(), key=lambda e: e[1])


def test_what_needs_all_stages_at_once_is_refused(ranks):
    for found in ranks:
        clip, tied = found["refused"]
        assert "--train.clip 0" in clip and "model.tied_head = false" in tied
