"""What is done to embeddings in training alone: NEFTune's bounded uniform noise, randomised positions, shrunk gradients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.data.batch import Batch
from luban.models.build import build_model
from luban.models.recurrent import RecurrentBody
from luban.models.spec import uniform
from luban.nn.embedding import EmbeddingNoise, add_noise, shrink_gradient
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.position.learned import Learned
from luban.nn.position.randomised import Randomised
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.apply import Execution, apply
from luban.train.recipe import TrainConfig


def test_noise_is_uniform_within_its_bound():
    B, T, W, alpha = 64, 25, 36, 5.0
    noise = EmbeddingNoise(alpha)(torch.zeros(B, T, W))
    bound = alpha / math.sqrt(T * W)
    assert noise.abs().max() <= bound and noise.mean().abs() < 0.02 * bound
    assert noise.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert torch.equal(EmbeddingNoise(alpha).eval()(noise), noise)


def batch_of_two() -> Batch:
    """Two rows of eight tokens."""
    rows = torch.randint(0, 37, (2, 9)).numpy()
    return Batch(
        tokens=rows[:, :-1],
        targets=rows[:, 1:],
        loss_mask=rows[:, 1:] >= 0,
        documents=rows[:, 1:] * 0,
        positions=torch.arange(8).expand(2, 8).numpy(),
    )


def test_a_model_is_noisy_in_training_and_not_when_it_is_measured():
    spec = uniform(vocab_size=37, width=16, layers=1, mixer=Grouped(heads=2), feedforward=SwiGLU(width=24))
    model = build_model(spec, device="meta")
    add_noise(model, 10.0)
    engine = apply(
        Causal().loss(model), ParallelPlan(), AdamW(), execution=Execution(device=torch.device("cpu")), init=1
    )
    batch = batch_of_two()
    noisy = [float(engine.module({n: torch.from_numpy(a) for n, a in batch.arrays().items()}).sum) for _ in range(2)]
    measured = [engine.evaluate(batch)[0] for _ in range(2)]
    assert noisy[0] != noisy[1] and measured[0] == measured[1] not in noisy
    assert any(part.training for part in engine.module.modules() if isinstance(part, EmbeddingNoise))


def test_randomised_positions_are_drawn_in_training_and_not_when_a_model_is_measured():
    """And measuring takes nothing from the generator that training draws from."""
    spec = uniform(
        vocab_size=37,
        width=16,
        layers=1,
        context=8,
        position=Randomised(inner=Learned(), longest=64),
        mixer=Grouped(heads=2),
        feedforward=SwiGLU(width=24),
    )
    loss = Causal().loss(build_model(spec, device="meta"))
    engine = apply(loss, ParallelPlan(), AdamW(), execution=Execution(device=torch.device("cpu")), init=1)
    with torch.no_grad():
        for weight in engine.module.parameters():
            weight.add_(torch.randn_like(weight))
    batch = batch_of_two()
    state = torch.get_rng_state()
    measured = [engine.evaluate(batch)[0] for _ in range(2)]
    assert measured[0] == measured[1] and torch.equal(torch.get_rng_state(), state)
    tensors = {n: torch.from_numpy(a) for n, a in batch.arrays().items()}
    drawn = {float(engine.module(tensors).sum) for _ in range(4)}
    assert len(drawn) > 1


def test_a_recurrent_model_is_refused():
    with pytest.raises(ConfigError, match="neftune needs a Transformer"):
        add_noise(build_model(uniform(vocab_size=37, width=16, body=RecurrentBody()), device="meta"), 5.0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_shrunk_gradient_leaves_values_and_all_other_gradients_as_they_are(tied):
    """Of a tied table the head's part is not shrunk: the sum of both is known from an untied twin."""
    spec = uniform(vocab_size=37, width=16, layers=2, context=16, mixer=Grouped(heads=2), feedforward=SwiGLU(width=24))
    spec = replace(spec, tied_head=tied)
    tokens, found = torch.randint(0, 37, (2, 9)), []
    for alpha in (1.0, 0.1):
        model = build_model(spec, seed=3).double()
        shrink_gradient(model, alpha)
        hidden = model(tokens[:, :-1], output="hidden")
        loss = model.head(hidden, tokens[:, 1:])
        loss.backward()
        named = {name: p.grad for name, p in model.named_parameters()}
        found.append((loss.detach(), named.pop("decoder.embedding.tokens.weight"), named, hidden.detach()))
    (loss, table, others, hidden), (same, shrunk, rest, _) = found
    assert torch.equal(loss, same) and all(torch.equal(others[name], rest[name]) for name in others)
    output = torch.zeros_like(table)
    if tied:  # d loss / d W of the head alone
        weight = model.decoder.embedding.tokens.weight.detach().clone().requires_grad_()
        logits = hidden.flatten(0, 1) @ weight.T
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum").backward()
        output = weight.grad
    torch.testing.assert_close(shrunk - output, 0.1 * (table - output), rtol=1e-6, atol=1e-9)


def test_shrinking_needs_a_transformer_and_a_share():
    with pytest.raises(ConfigError, match="embedding_gradient needs a Transformer"):
        shrink_gradient(build_model(uniform(vocab_size=37, width=16, body=RecurrentBody()), device="meta"), 0.1)
    with pytest.raises(ValueError, match="embedding_gradient must lie in"):
        TrainConfig(embedding_gradient=0.0)
