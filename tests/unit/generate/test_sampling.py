"""Sampling settings: which values are taken, and penalties on tokens that were generated, against arithmetic."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

import luban
from luban import Sampling
from luban.core.errors import ConfigError, DataError
from luban.generate.logits import subtract


@pytest.mark.parametrize("name", ["max_tokens", "top_k", "n", "seed", "logprobs"])
@pytest.mark.parametrize("value", [2.5, 2.0, "2", True, float("nan")])
def test_what_is_no_whole_number_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a whole number"):
        Sampling(**{name: value})


def test_numpys_whole_numbers_are_taken():
    made = Sampling(max_tokens=np.int64(3), top_k=np.int32(2), n=np.uint8(2), seed=np.int64(7))
    assert made == Sampling(max_tokens=3, top_k=2, n=2, seed=7) and type(made.max_tokens) is int


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [-2.1, 2.1, float("nan")])
def test_penalties_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be between -2 and 2"):
        Sampling(**{name: value})


@pytest.mark.parametrize("make", [list, np.array, lambda ids: np.array(ids, np.int32), torch.tensor, tuple])
def test_prompts_may_be_arrays(tiny_checkpoint, make):
    engine = luban.Engine(luban.load_model(tiny_checkpoint))
    sampling = Sampling(max_tokens=4, temperature=0, ignore_eos=True)
    (want,) = engine.generate([[5, 9, 7]], sampling)
    for prompts in (make([5, 9, 7]), [make([5, 9, 7])]):
        (got,) = engine.generate(prompts, sampling)
        assert got.prompt_token_ids == [5, 9, 7] and got.token_ids == want.token_ids
    assert all(type(token) is int for token in got.prompt_token_ids)
    for wrong in ([5.0, 7.0], np.array([0.5]), [True, False]):
        with pytest.raises(DataError, match="a prompt is a string, a list of token ids"):
            engine.generate([wrong], sampling)


def test_penalties_equal_a_count_token_by_token():
    rng = random.Random()
    generated = [[rng.randrange(9) for _ in range(rng.randrange(12))] for _ in range(6)]
    presence = [rng.choice([0.0, rng.uniform(-2, 2)]) for _ in range(6)]
    frequency = [rng.choice([0.0, rng.uniform(-2, 2)]) for _ in range(6)]
    logits = torch.randn(6, 9)
    got = subtract(logits, generated, presence, frequency)
    for row in range(6):
        for token in range(9):
            count = generated[row].count(token)
            want = logits[row, token].item() - (presence[row] if count else 0) - frequency[row] * count
            assert got[row, token].item() == pytest.approx(want, abs=1e-5)


def test_greedy_tokens_are_the_best_after_the_penalties(tiny_checkpoint):
    m, prompt = luban.load_model(tiny_checkpoint), [5, 9]
    once, each = 1.5, 0.7
    sampling = Sampling(max_tokens=12, temperature=0, ignore_eos=True, presence_penalty=once, frequency_penalty=each)
    plain = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
    engine = luban.Engine(m)
    result, other = [engine.generate([prompt], each)[0] for each in (sampling, plain)]
    for at, token in enumerate(result.token_ids):
        before = result.token_ids[:at]
        logits = m.module(torch.tensor([prompt + before]))[0, -1].detach()
        for seen in set(before):
            logits[seen] -= once + each * before.count(seen)
        assert logits[token] >= logits.max() - 1e-4
    assert result.token_ids != other.token_ids  # or nothing was penalised


@pytest.mark.parametrize("field", ["temperature", "repetition_penalty", "length_penalty", "logit_bias"])
def test_extreme_numbers_give_a_text_or_a_reason(field, tiny_checkpoint):
    """Never infinite logits, of which any token may come."""
    engine = luban.Engine(luban.load_model(tiny_checkpoint))
    for value in (5e-324, 1e-30, 1e-6, 1e-3, 20.0, 1e6, 1e30, 1.7e308):
        settings = {"logit_bias": {1: value}} if field == "logit_bias" else {field: value}
        try:
            sampling = Sampling(max_tokens=2, seed=1, beams=2 if field == "length_penalty" else 1, **settings)
        except ConfigError as error:
            assert field in str(error)
            continue
        assert len(engine.generate("hi", sampling)[0].token_ids) <= 2
    assert Sampling(temperature=1e-30).greedy and not Sampling(temperature=1e-3).greedy
