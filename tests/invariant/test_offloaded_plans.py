"""Offloading in several processes changes nothing: bit by bit the losses, norms, weights and moments of the same plan without it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from drawn import drawn
from spread import PROCESSES, ROWS, ZOO, engine, join, joined, through_disk, train

from luban.core.plan import ParallelPlan
from luban.parallel.world import World

STEPS = 4
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
    """What differs between a plan and the same plan offloaded; the second half of the latter's steps run in one process that went on
    from its checkpoint, or begin there."""
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
