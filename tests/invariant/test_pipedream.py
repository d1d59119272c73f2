"""PipeDream in two processes equals a simulation in one: each stage's forward and backward pass of a micro-batch use the weights
that the schedule's staleness says, and update the newest. Mixtures of experts are among the models: their auxiliary losses weigh
in each update as in a batch of its own."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace
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
from luban.nn.position.rope import Rope
from luban.nn.roles import roles_of
from luban.optim.adamw import AdamW
from luban.optim.base import Update
from luban.parallel.asynchronous import Asynchronous
from luban.parallel.routers import Routers, routers_of
from luban.parallel.world import World
from luban.planner.pipeline.pipedream import staleness

SEED, ROWS, MICRO_BATCHES, STEPS = 3, 8, 4, 2
PROCESSES = 2
PLAN = {"pipeline": PROCESSES, "microbatches": MICRO_BATCHES, "schedule": "pipedream"}
MODELS = {  # of families.py, without positions and tables that stages would share → the layers of the first stage
    "decoder-kerple": 1,
    "experts": 2,
    "experts-gshard": 2,  # with a capacity, and second experts drawn at random
}


def family(name: str):
    whole = FAMILIES[name]
    return replace(whole, spec=replace(whole.spec, position=Rope(), tied_head=False))


def batch_of(name: str, step: int):
    return family(name).batch(ROWS, np.random.default_rng([SEED, step]))


def inputs_of(name: str, model, batch) -> dict[str, torch.Tensor]:
    """What the loss reads; rows weigh in the auxiliary losses as their targets do in an update's loss."""
    found = tensors(batch)
    routers = Routers.of({part: layer.count for part, layer in routers_of(model).items()}, model)
    found |= {part: torch.from_numpy(array) for part, array in routers.arrays(batch).items()}
    if "router_weights" in found:
        found["router_weights"] = found["router_weights"] * MICRO_BATCHES / batch.target_count
    return found


def simulated(name: str) -> dict[str, torch.Tensor]:
    """The weights after the steps, micro-batch by micro-batch."""
    module = family(name).objective.loss(build_model(family(name).spec, dtype="float64", seed=SEED))
    newest = dict(module.model.named_parameters())
    first = ("decoder.embedding.", *(f"decoder.blocks.{layer}." for layer in range(MODELS[name])))
    stage_of = {n: int(not n.startswith(first)) for n in newest}
    optimizer = AdamW(lr=1e-2, eps=1e-4).build(newest, roles_of(module.model))
    for step in range(STEPS):
        batch = batch_of(name, step)
        inputs = inputs_of(name, module.model, batch)
        versions = [{n: p.detach().clone() for n, p in newest.items()}]
        for m in range(MICRO_BATCHES):
            met = {n: versions[m - staleness(PROCESSES, stage_of[n], m)][n].clone().requires_grad_() for n in newest}
            part = {n: t.chunk(MICRO_BATCHES)[m] for n, t in inputs.items()}
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
    found = {}
    for name in MODELS:
        engine = engine_of(family(name), **settings)
        versions = count_versions(engine.runner)
        results = [engine.step(batch_of(name, step)) for step in range(STEPS)]
        wanted, state = simulated(name), engine.state_dict()["model"]
        errors = {n: float((state[n] - w).norm() / w.norm().clamp_min(1e-3)) for n, w in wanted.items()}
        good = all(not r.bad for r in results)
        found[name] = {"errors": errors, "good": good, "metrics": results[-1].metrics, "versions": max(versions)}
    refused = []
    for changed in ({"clip": 1.0}, {}):
        try:
            engine_of(family("decoder-kerple") if changed else FAMILIES["decoder"], **settings | changed)
        except ConfigError as error:
            refused.append(str(error))
    Path(folder, f"{rank}.json").write_text(json.dumps({"found": found, "refused": refused}))
    dist.destroy_process_group()


def count_versions(runner: Asynchronous) -> list[int]:
    """How often each weight is there at once, of several the most, noted around every piece of work from now on."""
    counts, act = [], runner._act

    def counted(*words):
        kept = []
        for weight in (*runner.params.working.items(), *(w for v in runner.versions.values() for w in v.items())):
            kept.append((weight[0].removeprefix("model."), weight[1].data_ptr()))
        counts.append(max(Counter(name for name, _ in set(kept)).values()))
        act(*words)

    runner._act = counted
    return counts


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("pipedream")
    warm.processes(worker, PROCESSES, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", MODELS)
def test_weights_equal_those_of_the_simulation(ranks, name):
    for found in (rank["found"][name] for rank in ranks):
        assert found["good"] and max(found["errors"].values()) < 1e-9, max(found["errors"].items(), key=lambda e: e[1])
        assert ("expert_load_max" in found["metrics"]) == (name != "decoder-kerple")


def test_a_stage_keeps_as_many_versions_as_updates_pass_between_two_passes(ranks):
    """The last one has its weights alone."""
    for name in MODELS:
        assert [rank["found"][name]["versions"] for rank in ranks] == [PROCESSES - p for p in range(PROCESSES)]


def test_what_needs_all_stages_at_once_is_refused(ranks):
    for found in ranks:
        clip, tied = found["refused"]
        assert "--train.clip 0" in clip and "model.tied_head = false" in tied
