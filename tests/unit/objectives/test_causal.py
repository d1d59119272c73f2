"""Cross-entropy sums against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from luban import build_model
from luban.core.errors import ConfigError
from luban.models.spec import uniform
from luban.nn import lm_head
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal, CausalLoss


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    spec = uniform(
        vocab_size=61,
        width=16,
        layers=1,
        context=32,
        mixer=Grouped(heads=2),
        feedforward=SwiGLU(width=20),
        tied_head=request.param,
    )
    return build_model(spec, dtype="float64")


def batch_of(tokens, targets, mask, **others):
    return {"tokens": tokens, "targets": targets, "loss_mask": mask, **others}


def causal_loss(model, tokens, targets, mask, **others):
    return CausalLoss(model)(batch_of(tokens, targets, mask, **others)).sum


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunked", [False, True])
def test_equals_cross_entropy_with_its_gradients(model, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", 61 * 4)  # four rows at once
    tokens, targets = torch.randint(0, 61, (2, 3, 11))
    mask = torch.rand(3, 11) < 0.6
    total = causal_loss(model, tokens, targets, mask)
    expected = F.cross_entropy(model(tokens)[mask], targets[mask], reduction="sum")
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    mine, theirs = gradients(model, total), gradients(model, expected)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("chunked", [False, True])
def test_smoothing_and_z_loss_by_their_definitions(model, chunked, monkeypatch):
    from luban.kernels.reference.cross_entropy import linear_cross_entropy

    if chunked:
        monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", 61 * 4)
    objective = Causal(smoothing=0.2, z_loss=0.01)
    tokens, targets = torch.randint(0, 61, (2, 3, 11))
    mask = torch.rand(3, 11) < 0.6
    rows, weight = model(tokens, output="hidden"), model.head.weight
    expected = linear_cross_entropy(rows[mask], weight, targets[mask], smoothing=0.2, z_loss=0.01)
    total = objective.loss(model)(batch_of(tokens, targets, mask)).sum
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    mine, theirs = gradients(model, total), gradients(model, expected)
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-12, msg=name)
    assert objective.measured() == Causal()
    for wrong in ({"smoothing": 1.0}, {"z_loss": -1.0}):
        with pytest.raises(ConfigError, match="smoothing is a share"):
            Causal(**wrong)


def test_nothing_trained_is_zero_with_a_gradient(model):
    tokens = torch.randint(0, 61, (2, 5))
    total = causal_loss(model, tokens, tokens, torch.zeros(2, 5, dtype=torch.bool))
    total.backward()
    assert total.item() == 0


def test_targets_that_are_not_trained_may_be_anything(model):
    tokens, mask = torch.randint(0, 61, (1, 6)), torch.tensor([[True] * 3 + [False] * 3])
    wild = tokens.clone()
    wild[0, 4] = 10_000
    assert causal_loss(model, tokens, wild, mask) == causal_loss(model, tokens, tokens, mask)


def test_without_a_gpu_nothing_hangs_on_the_number_of_documents(model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CausalLoss(model), dynamic=False, backend=counter)
    tokens = torch.randint(0, 61, (2, 24))
    documents, positions = torch.zeros(2, 24, dtype=torch.int32), torch.arange(24).expand(2, -1)
    for places in (16, 32):
        starts = torch.full((2, places), 24, dtype=torch.int32)
        starts[:, 0] = 0
        compiled(
            batch_of(tokens, tokens, tokens >= 0, documents=documents, positions=positions, document_starts=starts)
        )
    assert counter.frame_count == 1


def test_half_precision_is_summed_in_float32():
    spec = uniform(vocab_size=61, width=16, layers=1, context=32, mixer=Grouped(heads=2))
    model = build_model(spec, dtype="bfloat16")
    tokens = torch.randint(0, 61, (2, 9))
    total = causal_loss(model, tokens, tokens, torch.ones(2, 9, dtype=torch.bool))
    logits = model(tokens).double().flatten(0, 1)
    assert total.dtype == torch.float32
    torch.testing.assert_close(
        total.double(), F.cross_entropy(logits, tokens.flatten(), reduction="sum"), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("chunked", [False, True])
def test_log_probabilities_and_entropies_of_every_token(model, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", 61 * 4)
    tokens, targets = torch.randint(0, 61, (2, 3, 11))
    targets[0, :4] = -100
    hidden = model(tokens, output="hidden")
    logprobs, entropies = model.head(hidden, targets, reduce="none")
    wanted = model(tokens).log_softmax(-1)
    picked = wanted.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    torch.testing.assert_close(logprobs, torch.where(targets < 0, 0.0, picked), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        entropies, torch.distributions.Categorical(logits=wanted).entropy(), rtol=1e-9, atol=1e-12
    )
    weights = torch.randn_like(logprobs)
    mine = gradients(model, (logprobs * weights).sum() + entropies.sum())
    again = model(tokens).log_softmax(-1)
    picked = torch.where(targets < 0, 0.0, again.gather(-1, targets.clamp_min(0)[..., None])[..., 0])
    theirs = gradients(model, (picked * weights).sum() - (again.exp() * again).sum())
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-10, msg=name)
