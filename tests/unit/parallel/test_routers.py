"""What routers are told of a step, and what they report of it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from families import FAMILIES, packed_batch

from luban import build_model
from luban.data.batch import Batch
from luban.nn.float8 import use_float8
from luban.nn.int8 import pack_for_inference
from luban.nn.moe.experts import ExpertProjection
from luban.nn.roles import roles_of
from luban.optim.base import hidden_matrices
from luban.parallel.routers import Routers


def test_the_figures_of_all_layers_are_those_of_counting():
    experts = {"a": 3, "b": 4}
    counts = [[random.randint(0, 9) for _ in range(n - 1)] + [1] for n in experts.values()]
    choices, dropped = [random.randint(10, 20), random.randint(10, 20)], [random.randint(0, 9), random.randint(0, 9)]
    balance, z_loss, weight = 1.2, 0.3, 0.5
    summed = [
        figure
        for layer in range(2)
        for figure in (*counts[layer], choices[layer], dropped[layer], balance * weight, z_loss * weight, weight)
    ]
    found = Routers(experts, {}, random=False).metrics(summed)
    loads = [max(numbers) / np.mean(numbers) for numbers in counts]
    assert found["expert_load_max"] == pytest.approx(max(loads))
    assert found["expert_load_mean"] == pytest.approx(np.mean(loads))
    assert found["expert_dropped"] == pytest.approx(sum(dropped) / sum(choices))
    assert found["balance_loss"] == pytest.approx(balance) and found["router_z_loss"] == pytest.approx(z_loss)


def test_a_row_has_its_own_random_numbers_and_weight_wherever_it_is_in_a_batch():
    routers = Routers({"a": 4}, {}, random=True)
    batch = packed_batch(6, np.random.default_rng())
    order = np.random.default_rng().permutation(6)[:4]
    whole, part = (
        routers.arrays(each) for each in (batch, Batch(**{name: array[order] for name, array in vars(batch).items()}))
    )
    assert whole["router_noise"].shape == batch.tokens.shape
    assert all(np.array_equal(part[name], whole[name][order]) for name in ("router_noise", "router_weights"))
    assert np.array_equal(whole["router_weights"], batch.loss_mask.sum(1))


def test_experts_stay_out_of_int8_fp8_and_muon():
    model = build_model(FAMILIES["experts"].spec)
    names = {
        f"{name}.weight": part.weight.clone()
        for name, part in model.named_modules()
        if isinstance(part, ExpertProjection)
    }
    assert names and not hidden_matrices(roles_of(model)) & names.keys()
    use_float8(model)
    pack_for_inference(model)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in names.items())
