"""Training state on the host and on a disk: the same training, other places."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from drawn import drawn
from families import FAMILIES, engine_of
from torch import nn

from luban.core.errors import ConfigError, UnsupportedError
from luban.core.plan import ParallelPlan
from luban.optim.adamw import AdamW
from luban.optim.base import Update
from luban.optim.muon import Muon
from luban.parallel.offload.delayed import DelayedOptimizer
from luban.parallel.offload.host_params import HostParams
from luban.parallel.offload.pools import DiskPool
from luban.planner.offload import efficiency, state_intensity

FAMILY = FAMILIES["decoder"]


def trained(plan: ParallelPlan, seed: int, steps: int = 4, **settings):
    engine = engine_of(FAMILY, seed=seed, plan=plan, accumulate=2, **settings)
    results = [engine.step(FAMILY.batch(8, np.random.default_rng([seed, n]))) for n in range(steps)]
    return engine, [(r.loss, r.grad_norm) for r in results]


@pytest.mark.parametrize(("offload", "precision"), drawn(product(["cpu", "disk"], ["fp32", "bf16", "fp64"]), 2))
def test_training_is_that_of_one_pool(offload, precision, tmp_path):
    """Bit by bit: losses, norms, weights, moments; and what is saved is taken up by a run without offloading, and back."""
    seed = random.randrange(10**6)
    plan = ParallelPlan(offload=offload, offload_folder=str(tmp_path))
    (plain, losses), (away, found) = (trained(p, seed, precision=precision) for p in (ParallelPlan(), plan))
    assert found == losses
    ours, theirs = away.state_dict(), plain.state_dict()
    for part in ("model", "optimizer"):
        assert ours[part].keys() == theirs[part].keys()
        for name, tensor in theirs[part].items():
            assert torch.equal(ours[part][name], tensor), name
    assert not os.listdir(tmp_path)  # the file has no name, so nothing stays
    other, _ = trained(plan, seed + 1, steps=1, precision=precision)
    other.load_state_dict(theirs)
    batch = FAMILY.batch(8, np.random.default_rng(99))
    assert other.step(batch).loss == plain.step(batch).loss
    for name, tensor in plain.state_dict()["model"].items():
        assert torch.equal(other.state_dict()["model"][name], tensor)


def test_the_device_holds_no_masters_and_no_gradients():
    engine, _ = trained(ParallelPlan(offload="cpu"), 1, steps=1, precision="bf16")
    params = engine.params
    assert isinstance(params, HostParams)
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in params.working.values())
    masters = {p.data_ptr() for p in params.parameters.values()}
    assert not masters & {p.data_ptr() for p in params.working.values()}
    seen = []
    for name, parameter in params.working.items():
        hook = lambda p, name=name: seen.append(sum(q.grad is not None for q in params.working.values()))  # noqa: E731
        parameter.register_post_accumulate_grad_hook(hook)
    engine.step(FAMILY.batch(8, np.random.default_rng(0)))
    assert len(seen) == 2 * len(params.working) and max(seen) == 0  # each had left before the next one was complete


def reference_delayed(weights: torch.Tensor, targets: list[torch.Tensor], warm_up: int) -> torch.Tensor:
    """Adam on ½|w − target|² whose gradients are taken one update late after the warm-up."""
    master = nn.Parameter(weights.clone())
    adam = torch.optim.AdamW([master], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    visible, late = master.detach().clone(), None
    for step, target in enumerate(targets):
        master.grad = visible - target
        before = master.detach().clone()
        adam.step()
        visible = master.detach().clone() if step < warm_up else before
        late = before
    del late
    return master.detach()


def test_delayed_updates_are_one_step_late():
    torch.manual_seed(random.randrange(10**6))
    weights, warm_up = torch.randn(6), 3
    targets = [torch.randn(6) for _ in range(9)]
    master = nn.Parameter(weights.clone())
    working = weights.clone()
    built = AdamW(lr=0.1, weight_decay=0.0).build({"w": master}, {"w": "norm"})
    optimizer = DelayedOptimizer(built, warm_up)
    for target in targets:
        gradient = working - target
        update = Update({master: gradient.clone()}, torch.ones(()), torch.ones((), dtype=torch.bool), {master: working})
        optimizer.step(1.0, update)
    optimizer.finish()
    torch.testing.assert_close(master.detach(), reference_delayed(weights, targets, warm_up))
    assert torch.equal(working, master.detach())
    again = DelayedOptimizer(AdamW(lr=0.1).build({"w": nn.Parameter(weights.clone())}, {"w": "norm"}), warm_up)
    again.load_state_dict(optimizer.state_dict())
    assert again.steps == len(targets)  # no second warm-up


def test_delayed_training_saves_and_goes_on():
    """After a save both runs go on from the same visible weights."""
    plan = ParallelPlan(offload="cpu", offload_delay=True)
    engine, losses = trained(plan, 5, steps=6)
    engine.optimizer.warm_up = 0
    for n in range(6, 9):
        engine.step(FAMILY.batch(8, np.random.default_rng([5, n])))
    state = {part: {k: v.clone() for k, v in tensors.items()} for part, tensors in engine.state_dict().items()}
    other, _ = trained(plan, 6, steps=1)
    other.optimizer.warm_up = 0
    other.load_state_dict(state)
    for n in range(9, 12):
        batch = FAMILY.batch(8, np.random.default_rng([5, n]))
        assert engine.step(batch).loss == other.step(batch).loss
    assert all(np.isfinite(loss) for loss, _ in losses)


def test_a_full_disk_is_met_before_the_first_step(tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"has no space: offloading to it needs 1e\+06 TB|has no space|can't be used"
    ):
        DiskPool(tmp_path, 10**18)
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsupportedError, match="can't be used"):
        DiskPool(tmp_path / "file", 10)


def test_tensors_of_a_file_keep_their_bits(tmp_path):
    shapes = [(3, 5), (), (1000,), (0,)]
    pool = DiskPool(tmp_path, DiskPool.bytes_of(shapes, torch.float32))
    tensors = [pool.zeros(shape, torch.float32) for shape in shapes]
    values = [torch.randn(shape) for shape in shapes]
    for tensor, value in zip(tensors, values, strict=True):
        assert not tensor.any()
        tensor.copy_(value)
    assert all(torch.equal(t, v) for t, v in zip(tensors, values, strict=True))
    assert pool.used <= pool.size


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"offload": "disk"}, "needs a folder"),
        ({"offload_delay": True}, "use --plan.offload cpu"),
        ({"offload": "cpu", "shard": 2}, "one process"),
    ],
)
def test_plans_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        ParallelPlan(**fields)


def test_other_optimizers_are_refused():
    for optimizer in (Muon(), AdamW(moments="bf16")):
        with pytest.raises(ConfigError, match="Adam with fp32 moments"):
            engine_of(FAMILY, seed=0, plan=ParallelPlan(offload="cpu"), optimizer=optimizer)


def test_offloading_goes_with_schedules_of_rematerialisation():
    family = replace(FAMILY, spec=replace(FAMILY.spec, layers=FAMILY.spec.layers[:1] * 5))
    found = []
    for plan in (ParallelPlan(), ParallelPlan(offload="cpu", remat="rotor", remat_budget="60%")):
        engine = engine_of(family, seed=3, plan=plan, precision="fp64")
        found.append([engine.step(family.batch(8, np.random.default_rng(n))).loss for n in range(3)])
    assert found[0] == found[1]


def test_the_efficiency_model():
    """Rajbhandari et al. 2021, section 4.2: at 70 TFLOP/s the state of 2 × 1,024 tokens needs about 1.5 TB/s for 90%."""
    assert efficiency(state_intensity(2 * 1024), 1.5e12, 70e12) == pytest.approx(0.9, abs=0.02)
    assert efficiency(1.0, 1.0, 1.0) == 0.5
