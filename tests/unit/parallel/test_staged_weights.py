"""Weights that are rounded on the host before they are copied to the device, and sums that keep their memory."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from families import FAMILIES, engine_of

from luban.core.plan import ParallelPlan

FAMILY = FAMILIES["decoder"]


def without_delay_at_first(plan: ParallelPlan, seed: int):
    engine = engine_of(FAMILY, seed=seed, plan=plan, accumulate=2, precision="bf16")
    if plan.offload_delay:
        engine.optimizer.warm_up = 0
    return engine


def states(engine, seed: int, steps: int = 4) -> list[dict]:
    found = []
    for n in range(steps):
        engine.step(FAMILY.batch(8, np.random.default_rng([seed, n])))
        found.append(engine.evaluate(FAMILY.batch(4, np.random.default_rng(n))))
    return [*found, engine.state_dict()["model"]]


@pytest.mark.parametrize("fields", [{"offload": "cpu"}, {"offload": "cpu", "offload_delay": True}, {"offload": "disk"}])
def test_weights_that_are_rounded_on_the_host_first_are_the_same(fields, tmp_path):
    seed, plan = random.randrange(10**6), ParallelPlan(**fields, offload_folder=str(tmp_path))
    plain, staged = without_delay_at_first(plan, seed), without_delay_at_first(plan, seed)
    staged.params.stage()
    assert not {p.data_ptr() for p in staged.params.copies().values()} & {
        p.data_ptr() for p in staged.params.working.values()
    }
    (*ours, weights), (*theirs, expected) = states(staged, seed), states(plain, seed)
    assert ours == theirs and all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    staged.load_state_dict(plain.state_dict())
    assert all(torch.equal(p, plain.params.working[name]) for name, p in staged.params.working.items())


def test_a_late_update_reads_its_own_steps_sums():
    """The update of a step doesn't begin before the next step's gradients are all there."""
    plan = ParallelPlan(offload="cpu", offload_delay=True)
    plain, late = without_delay_at_first(plan, 3), without_delay_at_first(plan, 3)
    begin, algorithm = threading.Event(), late.optimizer.algorithms[0]
    step, finish = algorithm.step, late.optimizer.finish

    def waiting(*args) -> None:
        assert begin.wait(60)
        begin.clear()
        step(*args)

    def released() -> bool:
        if late.optimizer._running is not None:
            begin.set()
        return finish()

    algorithm.step, late.optimizer.finish = waiting, released
    for n in range(4):
        batch = FAMILY.batch(8, np.random.default_rng(n))
        assert late.step(batch).loss == plain.step(batch).loss
