"""Bytes that processes send, counted at the collectives, equal the published volumes and the planner's arithmetic."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from counted import Sent
from families import PLAIN, TOKENS, Family, engine_of, packed_batch

from luban.core.plan import ParallelPlan
from luban.models.describe import describe
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal
from luban.parallel.world import World
from luban.planner.traffic import Spread

PROCESSES, ROWS, LAYERS, WIDTH, BYTES = 2, 8, 3, 32, 8
FAMILY = Family(  # everything divides, so that nothing is padded
    uniform(
        **{**PLAIN, "vocab_size": 48},
        layers=LAYERS,
        mixer=Grouped(heads=4, kv_heads=2),
        feedforward=SwiGLU(width=48),
        tied_head=True,
    ),
    Causal(),
    lambda rows, rng: replace(packed_batch(rows, rng, words=48), loss_mask=np.ones((rows, TOKENS), dtype=bool)),
)
PLANS = [
    {"replicate": 2},
    {"shard": 2},
    {"shard": 2, "zero": 2},
    {"shard": 2, "zero": 1},
    {"tensor": 2},
    {"tensor": 2, "remat": "full"},
    {"pipeline": 2, "microbatches": 2},
    {"context": 2},
]
CASES = [(plan, 1) for plan in PLANS] + [(plan, 2) for plan in PLANS if "shard" in plan or "tensor" in plan]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE=str(PROCESSES), RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    found = []
    for fields, accumulate in CASES:
        plan = ParallelPlan(**fields)
        world = World.join(plan, torch.device("cpu"))
        engine = engine_of(FAMILY, seed=0, plan=plan, world=world, precision="fp64", accumulate=accumulate)
        batch = FAMILY.batch(ROWS, np.random.default_rng(0))
        engine.step(batch)  # the first one also tells shapes
        with Sent(PROCESSES) as sent:
            engine.step(batch)
        held = sum(p.numel() for p in engine.params.parameters.values())
        found.append({"bytes": sent.bytes, "count": sent.count, "held": held})
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> Iterator[dict[str, list[dict]]]:
    folder = tmp_path_factory.mktemp("traffic")
    warm.processes(worker, PROCESSES, str(folder))
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    yield {str((plan, n)): [rank[i] for rank in ranks] for i, (plan, n) in enumerate(CASES)}


def spread_of(fields: dict, accumulate: int) -> Spread:
    plan = ParallelPlan(**fields)
    pieces = accumulate * plan.microbatches
    graph = describe(FAMILY.spec, batch=ROWS // plan.readers // pieces, seq=TOKENS, dtype="float64")
    return Spread(graph, plan, pieces, BYTES, BYTES)


@pytest.mark.parametrize(("fields", "accumulate"), CASES)
def test_counted_bytes_are_the_planners(counted, fields, accumulate):
    spread = spread_of(fields, accumulate)
    for rank, found in enumerate(counted[str((fields, accumulate))]):
        process = rank if spread.plan.pipeline > 1 else 0
        wanted = Counter()
        for row in spread.traffic(process):
            wanted[row.collective] += row.bytes
        assert found["bytes"] == wanted, (rank, spread.traffic(process))
        assert found["held"] == spread.parameters(process) // spread.plan.shard


@pytest.mark.parametrize(("zero", "volume"), [(1, 2), (2, 2), (3, 3)])
def test_zero_sends_the_published_volume(counted, zero, volume):
    graph = describe(FAMILY.spec)
    numbers = graph.parameters
    fields = {"shard": 2} if zero == 3 else {"shard": 2, "zero": zero}
    for found in counted[str((fields, 1))]:
        # at ZeRO 3 the weights outside of the layers stay gathered from the forward to the backward pass
        once = sum(op.parameters for op in graph.ops if not op.layer) if zero == 3 else 0
        sent = (volume * numbers - once) * BYTES * (PROCESSES - 1) // PROCESSES
        assert sum(found["bytes"].values()) == sent


def test_a_tensor_parallel_layer_sends_as_much_as_four_all_reduces(counted):
    found = counted[str(({"tensor": 2}, 1))][0]
    states = ROWS * TOKENS * WIDTH * BYTES
    four = 4 * 2 * states * (PROCESSES - 1) // PROCESSES
    edges = (
        2 * states * (PROCESSES - 1) // PROCESSES
    )  # tokens are joined behind the last layer, their gradients before the first
    assert found["bytes"]["all-gather"] + found["bytes"]["reduce-scatter"] == LAYERS * four + edges
    # each all-reduce as one reduce-scatter and one all-gather
    assert found["count"]["reduce-scatter"] == 4 * LAYERS and found["count"]["all-gather"] == 4 * LAYERS + 2
