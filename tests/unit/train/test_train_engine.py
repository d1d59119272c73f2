"""One step against a plain computation with autograd."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from luban.data.loader import Loader
from luban.data.shards import Shards
from luban.parallel.engine import to_device
from luban.train.run import make_engine
from luban.train.start import choose_start

CPU = torch.device("cpu")


def engine_of(recipe):
    shards = Shards.open(recipe.data.path)
    return make_engine(recipe, choose_start(recipe, shards), CPU)


def batch_of(recipe):
    train = recipe.train
    return Loader(Shards.open(recipe.data.path), batch_size=train.batch_size, seq_len=train.seq_len, seed=7).batch(0)


def test_one_step_is_clipped_adamw_on_the_mean_loss_of_the_trained_tokens(tiny):
    recipe = tiny(train={"clip": 0.5}, optim={"type": "adamw", "lr": 0.01, "weight_decay": 0.2})
    made, batch = engine_of(recipe), batch_of(recipe)
    mask = np.random.default_rng().random(batch.loss_mask.shape) < 0.6
    batch = replace(batch, loss_mask=batch.loss_mask & mask)
    plain = copy.deepcopy(made.model)
    given = to_device(batch, CPU)
    logits = plain(given["tokens"], documents=given["documents"], positions=given["positions"]).double()
    loss = torch.nn.functional.cross_entropy(logits[given["loss_mask"]], given["targets"][given["loss_mask"]])
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim == 2], "weight_decay": 0.2},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=0.005, betas=(0.9, 0.95), eps=1e-8, foreach=False).step()

    result = made.step(batch, 0.5)

    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    assert result.tokens == (batch.documents >= 0).sum() and not result.bad
    for (name, ours), theirs in zip(made.model.named_parameters(), plain.parameters(), strict=True):
        # where a gradient is near 0 Adam's first step is its sign: compare where it is not
        sure = theirs.grad.abs() > 1e-6
        torch.testing.assert_close(ours[sure], theirs[sure], rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_weigh_tokens_not_rows(tiny, accumulate):
    """Rows with very different numbers of trained tokens: a mean of means would be far off."""
    recipe = tiny(optim={"type": "adamw", "eps": 1.0})  # a large eps makes the update linear in the gradient
    batch = batch_of(recipe)
    keep = np.ones_like(batch.loss_mask)
    keep[0, 3:], keep[2, 1:] = False, False
    batch = replace(batch, loss_mask=batch.loss_mask & keep)
    whole, cut = engine_of(recipe), engine_of(replace(recipe, train=replace(recipe.train, accumulate=accumulate)))
    a, b = whole.step(batch, 1.0), cut.step(batch, 1.0)
    assert a.loss == pytest.approx(b.loss, rel=1e-5) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    for ours, theirs in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_bad_step_changes_nothing_and_is_told(tiny, precision):
    recipe = tiny(train={"precision": precision})
    made, batch = engine_of(recipe), batch_of(recipe)
    made.step(batch, 1.0)
    before = {name: p.detach().clone() for name, p in made.params.parameters.items()}
    state = {name: t.clone() for name, t in made.optimizer.state_dict().items()}
    with torch.no_grad():
        made.model.decoder.norm.weight[0] = float("nan")
    result = made.step(batch, 1.0)
    assert result.bad and not result.explained
    for name, p in made.params.parameters.items():
        poisoned = name == "decoder.norm.weight" and precision == "fp32"
        assert poisoned or torch.equal(p, before[name])
    assert all(torch.equal(t, state[name]) for name, t in made.optimizer.state_dict().items())


def test_fp16_overflow_lowers_the_scale_instead_of_counting_as_bad(tiny):
    recipe = tiny(train={"precision": "fp16"})
    made, batch = engine_of(recipe), batch_of(recipe)
    made.scale.value = 2.0**40
    result = made.step(batch, 1.0)
    assert result.bad and result.explained and made.scale.value == 2.0**39


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_half_precision_follows_fp32(tiny, precision, tolerance):
    """Ten steps on one batch: losses within a few units of the type's precision (2⁻⁸, 2⁻¹¹)."""
    recipe = tiny()
    batch = batch_of(recipe)
    full, half = engine_of(recipe), engine_of(replace(recipe, train=replace(recipe.train, precision=precision)))
    losses = [(full.step(batch, 1.0).loss, half.step(batch, 1.0).loss) for _ in range(10)]
    assert losses[-1][0] < losses[0][0] - 0.1
    for ours, theirs in losses:
        assert theirs == pytest.approx(ours, rel=tolerance)
