"""Families of small models, trained in this process's place of a plan over several processes."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from families import FAMILIES, PLAIN, TOKENS, Family, engine_of, mixtures, packed_batch

from luban.checkpoint.checkpoint import Checkpoint
from luban.checkpoint.reader import CheckpointReader
from luban.checkpoint.saver import CheckpointSaver
from luban.core.plan import ParallelPlan
from luban.data.batch import Batch
from luban.models.spec import spec_to_dict, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.moe.top_k import TopK
from luban.objectives.causal import Causal
from luban.parallel.engine import TrainEngine
from luban.parallel.world import World

SEED, ROWS, PROCESSES = 3, 8, 4


def odd_batch(rows: int, rng: np.random.Generator) -> Batch:
    """Rows of an odd number of tokens."""
    batch = packed_batch(rows, rng)
    return Batch(**{name: array[:, : TOKENS - 1] for name, array in vars(batch).items()})


UNEVEN = Family(  # heads, key heads, inner width, vocabulary and tokens that neither 2 nor 4 processes divide evenly
    uniform(
        **PLAIN,
        layers=5,
        mixer=Grouped(heads=6, kv_heads=2, head_dim=6, qkv_bias=True, output_bias=True),
        feedforward=SwiGLU(width=50, bias=True),
        tied_head=True,
    ),
    Causal(smoothing=0.1, z_loss=1e-2),
    odd_batch,
)
MIXTURES = mixtures(TopK(balance=0.1, z_loss=0.01), "swiglu")  # the last layer is one, the layer before it isn't
LATE_MIXTURE = Family(replace(MIXTURES, layers=MIXTURES.layers[1:]), Causal(), packed_batch)
ZOO = {name: family for name, family in FAMILIES.items() if name not in ("recurrent-tape", "elmo-table")}
ZOO["uneven"] = UNEVEN
ZOO["late-mixture"] = LATE_MIXTURE
NAMES = list(ZOO)


def engine(name: str, plan: ParallelPlan, world: World, **execution) -> TrainEngine:
    """A family under a plan; what several processes compute is one process's up to rounding."""
    # A bias of keys has no gradient but rounding, which Adam's usual eps would make steps of full size of.
    settings = {"precision": "fp64", "accumulate": 2, "clip": 0.5, "eps": 1e-4, **execution}
    return engine_of(ZOO[name], seed=SEED, plan=plan, world=world, **settings)


def train(trained: TrainEngine, name: str, first: int, past: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the steps from `first` to before `past`."""
    found = []
    for step in range(first, past):
        batch, share = ZOO[name].batch(ROWS, np.random.default_rng([SEED, step])), step % 2 == 1
        result = trained.synchronize(trained.submit(share_of(batch, trained) if share else batch, share=share))
        found.append((result.loss, result.grad_norm))
    return found


def share_of(batch: Batch, trained: TrainEngine) -> Batch:
    """The rows that a loader gives this process."""
    world, pieces = trained.world, trained.accumulate * trained.world.plan.microbatches
    rows = np.arange(ROWS).reshape(pieces, world.plan.readers, -1)[:, world.reader].reshape(-1)
    return type(batch)(**{name: array[rows] for name, array in vars(batch).items()})


@cache
def joined(plan: ParallelPlan) -> World:
    """The processes under a plan; their groups are made once."""
    return World.join(plan, torch.device("cpu"))


def join(rank: int, folder: str) -> None:
    """Make this process one of PROCESSES that meet in the folder."""
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE=str(PROCESSES), RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)


def through_disk(first: TrainEngine, second: TrainEngine, name: str) -> None:
    """Save under one plan, every process its part, and go on under another from what was saved."""
    found = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(found)
    path, several = Path(found[0], "checkpoint"), first.world.size > 1
    if several or dist.get_rank() == 0:
        saver = CheckpointSaver(first.world.host_group())
        saved = saver.save(path, Checkpoint(spec=spec_to_dict(ZOO[name].spec), **first.held()))
        for parameter in first.params.parameters.values():
            parameter.data.fill_(float("nan"))  # training has gone on: what is written is a copy
        saved.result()
        saver.close()
    dist.barrier()
    reader = CheckpointReader.open(path)
    reader.verify(dist.get_rank(), PROCESSES)
    second.take_up(reader)
    dist.barrier()
    if dist.get_rank() == 0:
        sizes = [file.stat().st_size for file in path.glob("model*.safetensors")]
        assert max(sizes) < 0.75 * sum(sizes) if several else len(sizes) == 1
        shutil.rmtree(found[0])
