"""A training step on a GPU never waits for the device: torch is told to refuse whatever would."""

from __future__ import annotations

import pytest
import torch

from luban.core.plan import ParallelPlan
from luban.data.batch import Batch
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.optim.muon import Muon
from luban.parallel.apply import Execution, apply

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CUDA = torch.device("cuda")
SPEC = uniform(vocab_size=500, width=128, layers=2, context=256, mixer=Grouped(heads=2), feedforward=SwiGLU(width=256))


class RandomBatch:
    """Random tokens, one document a row."""

    target_count = tokens_read = 4 * 256
    cut = Batch.cut

    def __init__(self):
        self.ids = torch.randint(0, 500, (4, 257)).numpy()
        self.tokens = self.ids[:, :-1]

    def arrays(self):
        ids = self.ids
        return {"tokens": self.tokens, "targets": ids[:, 1:], "loss_mask": ids[:, 1:] >= 0}


class PackedBatch(RandomBatch):
    """The same with documents."""

    def arrays(self):
        documents = (torch.rand(4, 256) < 0.02).cumsum(1).int().numpy()
        return Batch(**super().arrays(), documents=documents, positions=documents).arrays()


def losses_without_waiting(optimizer, execution, batch_of):
    """The losses of five steps, of which the last three are submitted where torch refuses to wait for the device."""
    engine = apply(Causal().loss(build_model(SPEC, device="meta")), ParallelPlan(), optimizer, execution=execution)
    losses = [engine.step(batch_of()).loss for _ in range(2)]
    batches = [batch_of() for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        in_flight = [engine.submit(batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return losses + [engine.synchronize(step).loss for step in in_flight]


@pytest.mark.parametrize("batch_of", [RandomBatch, PackedBatch], ids=["plain", "packed"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("optimizer", [AdamW(), AdamW(moments="bf16"), Muon()], ids=["adamw", "adamw-bf16", "muon"])
def test_a_step_waits_for_nothing(optimizer, precision, accumulate, compiled, batch_of):
    execution = Execution(device=CUDA, precision=precision, compile=compiled, accumulate=accumulate)
    assert all(0 < loss < 10 for loss in losses_without_waiting(optimizer, execution, batch_of))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("precision", "weights"), [("fp32", "fp32"), ("fp8", "fp32"), ("fp8", "bf16"), ("bf16", "bf16")]
)
def test_other_precisions_wait_for_nothing_and_learn(precision, weights, compiled):
    """Random tokens: what can be learned within five steps is that all are as likely."""
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs 8-bit matmuls")
    execution = Execution(device=CUDA, precision=precision, masters=weights == "fp32", compile=compiled)
    losses = losses_without_waiting(AdamW(lr=3e-3), execution, PackedBatch)
    bare = losses_without_waiting(AdamW(lr=3e-3), Execution(device=CUDA), PackedBatch)
    assert losses == pytest.approx(bare, rel=0.02)
