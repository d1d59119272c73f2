"""Nothing of a float64 model's loss is computed in float32: then summing over rows in another order changes 1e-12."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from families import FAMILIES
from training_data import cut, tensors

from luban.models.build import build_model


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rows_of_a_batch_add_up(name):
    seed = random.SystemRandom().randrange(2**31)
    family = FAMILIES[name]
    loss = family.objective.loss(build_model(family.spec, dtype="float64", seed=seed))
    batch = tensors(family.batch(4, np.random.default_rng(seed)))
    found = []
    for pieces in (1, 4):
        loss.zero_grad()
        totals = [loss(piece).sum for piece in cut(batch, pieces)]
        assert all(total.dtype == torch.float64 for total in totals)
        sum(totals).backward()
        found.append({"loss": sum(totals).detach(), **{path: p.grad for path, p in loss.named_parameters()}})
    for path, whole in found[0].items():
        torch.testing.assert_close(found[1][path], whole, rtol=1e-11, atol=1e-11, msg=path)
