"""A training step on a GPU never waits for the device: torch is told to refuse whatever would."""

from __future__ import annotations

import pytest
import torch

from luban.data.batch import Batch
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.optim.muon import Muon
from luban.parallel.compile import loss_function
from luban.parallel.engine import TrainStep
from luban.parallel.precision import COMPUTE, LossScale, Masters
from luban.train.recipe import TrainConfig
from luban.train.run import prepare_blocks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SPEC = uniform(
    vocab_size=500, width=128, layers=2, context=256, mixer=Grouped(heads=2), feedforward=SwiGLU(width=256)
)


class RandomBatch:
    """Random tokens without document boundaries."""

    target_count = tokens_read = 4 * 256

    def arrays(self):
        ids = torch.randint(0, 500, (4, 257)).numpy()
        return ids[:, :-1], ids[:, 1:], ids[:, 1:] >= 0


class PackedBatch(RandomBatch):
    """The same with documents."""

    def arrays(self):
        tokens, targets, trained = super().arrays()
        documents = (torch.rand(4, 256) < 0.02).cumsum(1).int().numpy()
        return Batch(
            tokens=tokens, targets=targets, loss_mask=trained, documents=documents, positions=documents
        ).arrays()


def launch_without_waiting(optimizer, config, compiled, batch_of):
    """Some steps, of which those after the first two may not wait; their losses."""
    module = build_model(SPEC, device="cuda", seed=0)
    masters = Masters(module, COMPUTE[config.precision], split=config.weights == "fp32")
    prepare_blocks(module, config)
    step = TrainStep(loss_function(module, Causal(), compiled=compiled, regions=True), masters,
                     optimizer.build(masters.parameters), LossScale.of(config.precision), clip=1.0,
                     accumulate=config.accumulate, device=torch.device("cuda"))  # fmt: skip
    losses = [step(batch_of(), 1.0).loss for _ in range(2)]
    batches = [batch_of() for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [step.launch(batch, 1.0) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return losses + [step.settle(each).loss for each in launched]


@pytest.mark.parametrize("batch_of", [RandomBatch, PackedBatch], ids=["plain", "packed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", [AdamW(), AdamW(moments="bf16"), Muon()], ids=["adamw", "adamw-bf16", "muon"])
def test_a_step_waits_for_nothing(optimizer, precision, accumulate, compiled, batch_of):
    config = TrainConfig(precision=precision, accumulate=accumulate)
    assert all(0 < loss < 10 for loss in launch_without_waiting(optimizer, config, compiled, batch_of))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("precision", "weights"), [("fp32", "fp32"), ("fp8", "fp32"), ("fp8", "bf16"), ("bf16", "bf16")]
)
def test_other_precisions_wait_for_nothing_and_learn(precision, weights, compiled):
    """Random tokens: what can be learned within five steps is that all are as likely."""
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs 8-bit products")
    config = TrainConfig(precision=precision, weights=weights)
    losses = launch_without_waiting(AdamW(lr=3e-3), config, compiled, PackedBatch)
    bare = launch_without_waiting(AdamW(lr=3e-3), TrainConfig(precision="fp32"), False, PackedBatch)
    assert losses == pytest.approx(bare, rel=0.02)
