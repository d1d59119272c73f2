"""Rematerialisation changes what is kept, and nothing that is computed."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from luban.adapters.base import AdapterConfig
from luban.adapters.lora import LoRA
from luban.load.adapted import put_in
from luban.models.build import build_model, state_of
from luban.models.spec import uniform
from luban.models.stack import blocks_of
from luban.objectives.causal import Causal
from luban.parallel.remat.policies import SelectiveRemat, remat_policy


def run(what: str, seed: int, adapter: AdapterConfig | None = None) -> tuple[float, list[torch.Tensor], int]:
    """(loss, gradients, bytes kept for the backward pass outside checkpoints)."""
    spec = uniform(vocab_size=64, width=32, layers=3)
    module = build_model(spec, seed=seed)
    if adapter is not None:
        put_in(module, adapter, adapter.initial(spec, state_of(module), seed), "test")
        module.train()
        for number, parameter in enumerate(p for p in module.parameters() if p.requires_grad):
            draw = torch.Generator().manual_seed(seed + number)
            parameter.data.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
    torch.manual_seed(seed)
    for block in blocks_of(module):
        block.use_remat(remat_policy(what, block))
    tokens = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(seed))
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = (
            Causal()
            .loss(module)(
                {
                    "tokens": tokens[:, :-1],
                    "targets": tokens[:, 1:],
                    "documents": None,
                    "loss_mask": tokens[:, 1:] >= 0,
                    "positions": None,
                }
            )
            .sum
        )
    loss.backward()
    return loss.item(), [p.grad for p in module.parameters() if p.requires_grad], kept


@pytest.mark.parametrize("what", ["selective", "full"])
def test_loss_and_gradients_stay_and_less_is_kept(what):
    seed = int(torch.randint(0, 10**6, ()))
    plain, lean = run("none", seed), run(what, seed)
    assert lean[0] == plain[0]
    for ours, theirs in zip(lean[1], plain[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert lean[2] < plain[2] / 2


@pytest.mark.parametrize("what", ["selective", "full"])
def test_dropout_draws_the_same_when_a_layer_runs_again(what):
    """Else gradients are those of a network that gave another loss, and nothing says so."""
    seed, adapter = int(torch.randint(0, 10**6, ())), LoRA(rank=3, dropout=0.5, init="gaussian")
    plain, lean = run("none", seed, adapter), run(what, seed, adapter)
    assert lean[0] == plain[0] != run("none", seed, replace(adapter, dropout=0.0))[0]
    for ours, theirs in zip(lean[1], plain[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert any(gradient.abs().max() > 1e-3 for gradient in plain[1])


def test_matmuls_are_not_done_twice_under_the_selective_policy():
    from torch.utils.flop_counter import FlopCounterMode

    counts = {}
    for what in ("none", "selective", "full"):
        with FlopCounterMode(display=False) as counter:
            run(what, 1)
        counts[what] = counter.get_total_flops()
    assert counts["none"] == counts["selective"] < counts["full"]


def test_compiling_says_nothing_that_users_cannot_act_on():
    SelectiveRemat()
    SelectiveRemat()
    log = logging.getLogger("torch._higher_order_ops.wrap")
    told = {
        text: bool(log.filter(logging.makeLogRecord({"msg": text})))
        for text in (
            "\nDetected that context_fn is passed to torch.utils.checkpoint under torch.compile.\n",
            "something else",
        )
    }
    assert list(told.values()) == [False, True] and len(log.filters) == 1
