"""An encoder's states go straight from the stage that makes them to the stages that read them, once to a process, and what is
trained is what one process trains."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import warm
from counted import Sent
from families import FAMILIES, TOKENS, engine_of
from spread import PROCESSES, ROWS, SEED, join, joined

from luban.core.plan import ParallelPlan
from luban.models.describe import describe
from luban.parallel.world import World
from luban.planner.distribution import Distribution
from luban.planner.traffic import Spread

ENCODER, DECODER, BYTES = 3, 6, 8
WHAT = "encoder states and gradients, to and from their readers"
CASES = [  # family, plan, messages of encoder states a micro-batch in each direction: straight, through the stages in between
    ("t5", {"pipeline": 4, "microbatches": 4}, 3, 3),
    ("encoder-decoder", {"pipeline": 4, "microbatches": 2, "schedule": "gpipe", "stage_layers": (2, 3, 1, 3)}, 2, 2),
    ("t5", {"pipeline": 4, "microbatches": 2, "schedule": "zero_bubble", "stage_layers": (2, 1, 2, 4)}, 2, 2),
    ("t5", {"pipeline": 2, "tensor": 2, "microbatches": 2, "schedule": "interleaved"}, 1, 3),
    (
        "t5",
        {"pipeline": 4, "microbatches": 4, "schedule": "interleaved", "stage_layers": (1, 2, 1, 1, 1, 1, 1, 1)},
        3,
        6,
    ),
    (
        "encoder-decoder",
        {"pipeline": 2, "shard": 2, "microbatches": 2, "schedule": "interleaved", "interleave": 4},
        1,
        6,
    ),
]


def family(name: str):
    found = FAMILIES[name]
    spec = found.spec
    deep = replace(spec, encoder=spec.encoder[:1] * ENCODER, layers=spec.layers[:1] * DECODER)
    return replace(found, spec=deep)


def batch_of(name: str, step: int):
    return family(name).batch(ROWS, np.random.default_rng([SEED, step]))


def trained(name: str, plan: ParallelPlan, world: World):
    """The engine; losses and gradient norms, and a held-out loss; weights; bytes sent in the last step to other stages."""
    engine = engine_of(family(name), seed=SEED, plan=plan, world=world, precision="fp64", clip=0.5, eps=1e-4)
    first = engine.step(batch_of(name, 0))  # also tells shapes
    with Sent(PROCESSES) as sent:
        second = engine.step(batch_of(name, 1))
    heldout = engine.evaluate(batch_of(name, 9)).loss
    figures = np.array([first.loss, first.grad_norm, second.loss, second.grad_norm, heldout])
    return engine, figures, engine.state_dict()["model"], sent.bytes["send"]


def worker(rank: int, folder: str) -> None:
    join(rank, folder)
    names = ("t5", "encoder-decoder")
    known: list[dict] = [{}] * PROCESSES
    dist.all_gather_object(known, {name: trained(name, ParallelPlan(), World())[1:] for name in names[rank::PROCESSES]})
    single = {name: found for part in known for name, found in part.items()}
    found = []
    for name, fields, *_ in CASES:
        plan = ParallelPlan(**fields)
        engine, figures, state, sent = trained(name, plan, joined(plan))
        right, wanted, _ = single[name]
        errors = [float(np.abs(figures / right - 1).max())]
        errors += [float((state[n] - w).norm() / w.norm().clamp_min(1e-3)) for n, w in wanted.items()]
        left = [len(engine.runner.states), len(engine.runner.gradients), len(engine.runner.stashed)]
        process = joined(plan).index("pipeline")
        found.append({"error": max(errors), "sent": sent, "left": left, "process": process})
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[list[dict]]:
    folder = tmp_path_factory.mktemp("straight")
    warm.processes(worker, PROCESSES, str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


def spread_of(name: str, fields: dict) -> Spread:
    plan = ParallelPlan(**fields)
    rows = ROWS // plan.readers // plan.microbatches
    graph = describe(family(name).spec, batch=rows, seq=TOKENS, target=TOKENS, dtype="float64")
    return Spread(graph, plan, plan.microbatches, BYTES, BYTES)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_trains_as_one_process_and_sends_what_the_planner_says(ranks, case):
    name, fields, *_ = CASES[case]
    for found in (rank[case] for rank in ranks):
        assert found["error"] < 1e-9
        assert found["left"] == [0, 0, 0]  # nothing is kept behind the step
        rows = spread_of(name, fields).traffic(found["process"])
        assert found["sent"] == sum(row.bytes for row in rows if row.collective == "send")


@pytest.mark.parametrize(("name", "fields", "straight", "through"), CASES)
def test_states_are_sent_once_to_each_process_that_reads_them(name, fields, straight, through):
    spread = spread_of(name, fields)
    plan = spread.plan
    rows = [row for process in range(plan.pipeline) for row in spread.traffic(process) if row.what == WHAT]
    size = ROWS // plan.readers // plan.microbatches * TOKENS * 32 * BYTES
    assert sum(row.count for row in rows) == 2 * straight * plan.microbatches
    assert sum(row.bytes for row in rows) == 2 * straight * plan.microbatches * size
    ends = [end for _, end in plan.stage_runs(ENCODER + DECODER)]
    made = next(stage for stage, end in enumerate(ends) if end >= ENCODER)
    assert plan.stages - 1 - made == through >= straight
    assert any(WHAT in line for line in Distribution(spread).lines())
