"""Compiled layers under plans over several processes: the curve of one process that compiles nothing, in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import warm
from spread import PROCESSES, engine, join, joined, train

from luban.core.plan import ParallelPlan
from luban.parallel.world import World

COMPILED = [
    {"replicate": 2, "tensor": 2},
    {"shard": 2, "tensor": 2, "remat": "full"},
    {"pipeline": 2, "replicate": 2, "microbatches": 2},
    {"context": 2, "replicate": 2},
]


def compiled_worker(rank: int, folder: str) -> None:
    join(rank, folder)
    right, errors = train(engine("decoder", ParallelPlan(), World(), precision="fp32"), "decoder", 0, 2), []
    for plan in (ParallelPlan(**fields) for fields in COMPILED):
        found = train(engine("decoder", plan, joined(plan), precision="fp32", compile=True), "decoder", 0, 2)
        errors.append(float(np.abs(np.array(found) / np.array(right) - 1).max()))
    Path(folder, f"{rank}.json").write_text(json.dumps(errors))
    dist.destroy_process_group()


@pytest.mark.slow
def test_compiled_plans_equal_one_process_in_fp32(tmp_path):
    warm.processes(compiled_worker, PROCESSES, str(tmp_path))
    for rank in range(PROCESSES):
        assert max(json.loads((tmp_path / f"{rank}.json").read_text())) < 1e-5
