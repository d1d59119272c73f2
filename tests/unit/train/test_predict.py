"""A run on a GPU, predicted without one: the machine is made up, the figures are the planner's for its row of the table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from luban.core.errors import UnsupportedError
from luban.data.shards import Shards
from luban.kernels import dispatch, gated
from luban.models.describe import describe
from luban.planner.accelerators import accelerator
from luban.planner.memory import StepSettings, predict_memory
from luban.planner.step_time import predict_step
from luban.planner.table_rates import table_rates
from luban.train import device_rates
from luban.train.predict import predict, require_memory, trained_shapes
from luban.train.run import _sample
from luban.train.start import choose_start


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10**9, 80 * 10**9))
    monkeypatch.setattr(dispatch, "flash4_missing", lambda: "not installed")
    monkeypatch.setattr(dispatch, "INSTALLED", True)
    monkeypatch.setattr(gated, "serves", lambda *_: False)
    monkeypatch.setattr(device_rates, "measured_rates", None)  # nothing is measured
    return torch.device("cuda")


def test_a_run_on_a_gpu_of_the_table_is_predicted_by_arithmetic(tiny, shards, h100):
    recipe = tiny(
        train={"precision": "bf16", "accumulate": 2, "compile": True, "batch_size": 64}, plan={"remat": "full"}
    )
    opened = Shards.open(shards, "train")
    spec = choose_start(recipe, opened, None).spec

    def sample(rows):
        return _sample(recipe, opened, rows)

    found = predict(recipe, spec, h100, sample)
    graph = describe(spec, batch=32, seq=recipe.train.seq_len, dtype="bfloat16")
    parameters = trained_shapes(spec, None)
    settings = StepSettings(
        accumulates=True,
        remat="full",
        gpu_kernels=True,
        saves_activation=False,  # SwiGLU
        dense_masks=1,
        optimizer_bytes=recipe.optim.state_bytes(*parameters),
        update_bytes=recipe.optim.workspace_bytes(*parameters, widened=False),
    )
    row, head_dim = accelerator("h100-sxm"), spec.width // spec.last.mixer.heads
    rates = table_rates(row, "bf16", "luban", head_dim)  # the kernel for packed documents
    flops = recipe.optim.update_flops(*parameters)
    assert found.step == predict_step(graph, settings, rates, micro_batches=2, update_flops=flops)
    assert found.memory == predict_memory(graph, settings)
    assert found.machine.accelerator == row and found.model_flops == 2 * graph.model_flops
    assert found.available_bytes == 10**9 * 0.97 and "accelerator-hours" in "\n".join(found.lines())
    assert found.utilisation == found.model_flops / found.step.total / 989.4e12
    assert require_memory(recipe, spec, h100, found, sample) is None
    with pytest.raises(UnsupportedError, match=r"--train.accumulate 4 would need"):
        require_memory(recipe, spec, h100, replace(found, free_bytes=int(found.memory.total)), sample)
