"""Log-probabilities of prompts against one whole forward, however the engine reads them."""

from __future__ import annotations

import random

import pytest
import torch

import luban
from luban import Sampling
from luban.core.errors import DataError
from luban.serve.paged import PagedBatch


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return luban.load_model(tiny_checkpoint)


def by_hand(model, prompt: list[int]) -> torch.Tensor:
    """(T − 1, V) log-probabilities of what follows each token."""
    return model.module(torch.tensor([prompt]))[0, :-1].detach().log_softmax(-1)


def check(model, prompt, result, alternatives=2):
    first, *entries = result.prompt_logprobs
    assert first is None and [entry.token for entry in entries] == prompt[1:]
    for row, entry in zip(by_hand(model, prompt), entries, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
        assert [p for _, p in entry.top] == pytest.approx(row.topk(alternatives).values.tolist(), abs=1e-4)
        assert entry.sampling_logprob is None


@pytest.mark.parametrize("paged", [True, False])
def test_they_are_those_of_one_forward(model, paged):
    engine, rng = luban.Engine(model, paged=paged), random.Random()
    prompts = [[rng.randrange(16, 272) for _ in range(n)] for n in (1, 2, 16, 33)]
    sampling = Sampling(max_tokens=3, prompt_logprobs=2, n=2, ignore_eos=True)
    for prompt, result in zip(prompts, engine.generate(prompts, sampling), strict=True):
        check(model, prompt, result)
        assert len(result.choices) == 2
    (plain,) = engine.generate([prompts[-1]], Sampling(max_tokens=1))
    assert plain.prompt_logprobs is None


def test_prompts_read_in_parts_found_in_the_cache_and_preempted_lose_none(model):
    rng = random.Random(5)
    engine = luban.Engine(model)
    engine.batch = engine.intake.batch = PagedBatch(
        model.module, max_batch=4, max_tokens=9, block_size=4, cache_bytes=30 * 4 * 2 * 2 * 2 * 8 * 4
    )
    prompts = [[rng.randrange(16, 272) for _ in range(n)] for n in (30, 7, 21)]
    prompts.append(prompts[0][:24] + prompts[2])
    sampling = Sampling(max_tokens=20, prompt_logprobs=2, ignore_eos=True, seed=1)
    for prompt, result in zip(prompts, engine.generate(prompts, sampling), strict=True):
        check(model, prompt, result)
    for prompt, result in zip(prompts, engine.generate(prompts, sampling), strict=True):  # all in the prefix cache
        check(model, prompt, result)
    assert engine.batch.scheduler.preemptions > 0
    manager = engine.batch.scheduler.manager
    assert manager.free == manager.blocks and not any(manager.references)


def test_an_encoder_decoder_has_none(tiny_translator):
    engine = luban.Engine(luban.load_model(tiny_translator))
    with pytest.raises(DataError, match="predicts no token of its source"):
        engine.generate("a", Sampling(max_tokens=2, prompt_logprobs=1))
