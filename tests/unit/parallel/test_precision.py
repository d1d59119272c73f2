"""Loss scaling against torch's scaler; masters against plain arithmetic."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from families import FAMILIES, engine_of
from torch import nn

from luban.parallel.kept_sums import KeptSums
from luban.parallel.precision import LossScale, MixedPrecisionParams


def test_loss_scale_moves_as_torchs_does():
    scale = LossScale.of("fp16")
    scale.interval = 3
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for _ in range(60):
        overflow = random.random() < 0.3
        theirs.scale(torch.ones(1))  # it starts lazily
        weight.grad = torch.full((1,), float("inf") if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        scale.update(overflow)
        if scale.value < 4:
            break
        assert scale.value == theirs.get_scale()


def test_only_a_scale_that_can_still_fall_explains_an_overflow():
    scale = LossScale.of("fp16")
    assert all(scale.update(True) for _ in range(16)) and scale.value == 1
    assert not scale.update(True)
    for precision in ("fp32", "bf16"):
        assert not LossScale.of(precision).update(True) and LossScale.of(precision).value == 1


def test_masters_sum_micro_batches_in_fp32_and_refresh_what_was_stepped():
    module = nn.Linear(5, 4)
    reference = copy.deepcopy(module)
    params = MixedPrecisionParams(module, torch.bfloat16)
    weight = params.parameters["weight"]
    assert module.weight.dtype == torch.bfloat16 and weight.dtype == torch.float32
    total = torch.zeros(4, 5)
    for _ in range(7):
        x = torch.randn(3, 5, dtype=torch.bfloat16)
        (gradient,) = torch.autograd.grad(module(x).float().pow(2).sum(), module.weight)
        module(x).float().pow(2).sum().backward()
        params.accumulate()
        total += gradient.float()
    assert module.weight.grad is None
    assert torch.equal(params.gradients()["weight"], total)
    params.load_state_dict(
        {"weight": reference.weight + 1e-5, "bias": reference.bias}
    )  # 1e-5 next to 0.1 is lost in bf16
    assert torch.equal(weight, reference.weight + 1e-5)
    assert torch.equal(module.weight, (reference.weight + 1e-5).bfloat16())
    assert params.copies()[weight].data_ptr() == module.weight.data_ptr()
    params.clear()
    module(torch.ones(1, 5, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(params.gradients()["weight"], torch.ones(4, 5))


def test_fp32_has_no_second_copy():
    module = nn.Linear(2, 2)
    params = MixedPrecisionParams(module, torch.float32)
    assert params.parameters["weight"] is module.weight and not params.copies()


def test_bf16_weights_without_masters_are_the_modules_own():
    module = nn.Linear(2, 2)
    params = MixedPrecisionParams(module, torch.bfloat16, masters=False)
    assert params.parameters["weight"] is module.weight and module.weight.dtype == torch.bfloat16
    assert not params.copies()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_of_every_step_lie_in_the_same_memory(dtype):
    """Sums in fp32 of half-precision gradients, whatever a step reaches; gradients that are wide already become the sums."""
    torch.manual_seed(random.randrange(10**6))
    kept, wide, places = KeptSums(borrows=True), torch.promote_types(dtype, torch.float32), {}
    for _ in range(4):
        pieces = [{n: torch.randn(5, 3).to(dtype) for n in "abc" if random.random() < 0.7} for _ in range(3)]
        firsts, expected = {}, {}
        for piece in pieces:
            for name, gradient in piece.items():
                firsts.setdefault(name, gradient.data_ptr())
                expected[name] = expected[name] + gradient.to(wide) if name in expected else gradient.to(wide).clone()
        for piece in pieces:
            kept.add(piece)
        assert kept.sums.keys() == expected.keys()
        for name, total in kept.sums.items():
            assert torch.equal(total, expected[name]) and total.dtype == wide
            assert total.data_ptr() == (firsts[name] if dtype == wide else places.setdefault(name, total.data_ptr()))
        kept.clear()
        assert not kept.sums


def test_sums_in_turns_outlive_a_step():
    """What a delayed update still reads is not what the next step adds to; the step after that takes its memory again."""
    kept, seen = KeptSums(turns=2), []
    for step in range(4):
        kept.add({"a": torch.full((2,), float(step), dtype=torch.bfloat16)})
        seen.append(kept.sums["a"])
        kept.clear()
    assert [t.data_ptr() for t in seen[:2]] == [t.data_ptr() for t in seen[2:]]
    assert seen[2].tolist() == [2.0, 2.0] and seen[3].tolist() == [3.0, 3.0]


def test_steps_of_bf16_training_add_up_in_the_same_memory():
    """The engine's sums: the same storages in every step, and what fp32 sums of the micro-batches' gradients are."""
    family, seed = FAMILIES["decoder"], random.randrange(10**6)
    engine = engine_of(family, seed=seed, precision="bf16", accumulate=2)
    places = []
    original = engine.params.gradients

    def gradients():
        found = original()
        places.append({name: tensor.data_ptr() for name, tensor in found.items()})
        assert all(tensor.dtype == torch.float32 for tensor in found.values())
        return found

    engine.params.gradients = gradients
    for n in range(3):
        engine.step(family.batch(8, np.random.default_rng([seed, n])))
    assert len(places[0]) == len(engine.params.working) and places[0] == places[1] == places[2]
