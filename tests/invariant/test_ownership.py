"""Weights are read by their owners alone: in the owner's forward, in a backward, or by the optimizer.

Under Triton's interpreter the same tests run the fused path, in a process of their own.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from families import FAMILIES, engine_of
from interpreter import HERE, run_interpreted
from owned import OwnershipError, own, ownership_enforced

from luban.evals.likelihood import negative_log_likelihood, windows
from luban.generate.sampling import Sampling
from luban.generate.session import Sequence
from luban.generate.source import session_for
from luban.kernels.available import INTERPRETED

no_kernels = pytest.mark.skipif(INTERPRETED, reason="none of Triton's kernels runs in generation, or in bf16 on a CPU")


@pytest.mark.skipif(HERE, reason="runs directly")
def test_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is Linux-only")
    run_interpreted(__file__)


@pytest.fixture
def seed() -> int:
    return random.SystemRandom().randrange(2**31)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_and_evaluation(name, seed):
    family, rng = FAMILIES[name], np.random.default_rng(seed)
    engine = engine_of(family, seed=seed)
    batch = family.batch(1 if INTERPRETED else 2, rng)  # the interpreter is slow
    assert own(engine.model) == len(engine.params.working)
    with ownership_enforced(engine):
        total, count, _ = engine.evaluate(batch)
        loss = engine.step(batch).loss
        # in training alone an expert's capacity drops tokens
        assert loss == pytest.approx(total / count, rel=1e-1 if name == "experts-gshard" else 1e-5)


@no_kernels
@pytest.mark.parametrize("name", ["decoder", "recurrent"])
def test_training_with_fp32_weights_behind_bf16_ones(name, seed):
    family, rng = FAMILIES[name], np.random.default_rng(seed)
    engine = engine_of(family, seed=seed, precision="bf16", accumulate=2)
    own(engine.model)
    batch = family.batch(4, rng)
    with ownership_enforced(engine):
        first = engine.step(batch).loss
        assert engine.step(batch).loss != first


@no_kernels
@pytest.mark.parametrize("name", ["decoder", "decoder-kerple", "encoder-decoder", "t5"])
def test_generation(name, seed):
    model = engine_of(FAMILIES[name], seed=seed).model
    own(model)
    session = session_for(model)
    made = [
        Sequence([3, 4, 5], Sampling(temperature=0, max_tokens=4), seed=0),
        Sequence([7, 8], Sampling(top_p=0.9, repetition_penalty=1.2, logprobs=2), seed=seed),
    ]
    with ownership_enforced():
        session.add(made)
        for _ in range(4):
            session.choose()
            session.advance(made)
    assert [len(sequence.tokens) for sequence in made] == [4, 4]


@no_kernels
@pytest.mark.parametrize("name", ["decoder", "decoder-kerple", "recurrent"])
def test_likelihoods_of_an_evaluation(name, seed):
    model = engine_of(FAMILIES[name], seed=seed).model
    own(model)
    text = np.random.default_rng(seed).integers(0, 41, 30).tolist()
    with ownership_enforced():
        found = negative_log_likelihood(model, list(windows(text, [True] * 30, 12, 6)))
    assert all(value > 0 for value in found)


def test_reading_a_weight_elsewhere_raises(seed):
    """The mechanism itself: views, matmuls, conversions, lists, and a read inside of another module's forward."""
    model = engine_of(FAMILIES["decoder"], seed=seed).model
    own(model)
    block = model.decoder.blocks["0"]
    weight, other = block.mixer.qkv.q.weight, block.feedforward.gate.weight
    x = torch.randn(2, 32)
    with ownership_enforced():
        assert weight.shape == (32, 32) and weight.requires_grad and weight.grad is None
        for read in (
            lambda: x @ weight,
            lambda: weight.t(),
            lambda: weight.data,
            lambda: torch.cat([weight, other]),
            weight.detach,
            weight.half,
            weight.tolist,
            lambda: x.matmul(weight),
            lambda: weight[0],
        ):
            with pytest.raises(OwnershipError):
                read()
        block.feedforward.register_forward_pre_hook(lambda *_: x @ weight)
        with pytest.raises(OwnershipError, match=r"mixer\.qkv\.q\.weight"):
            block.feedforward(x[None])
