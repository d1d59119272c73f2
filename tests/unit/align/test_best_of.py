"""Best-of-n: the choice, rejection sampling, and its closed forms."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from luban.align.best_of import best_of, best_of_n_kl, expected_best, rejection_sample
from luban.align.prompts import prompt_ids
from luban.align.rewards.base import Rewards
from luban.align.rollout import Sampler
from luban.core.errors import DataError
from luban.generate.sampling import Sampling
from luban.load.model import load_model
from luban.serve.engine import Engine


class Length:
    name = "length"

    def scores(self, answers):
        return [float(len(answer.text)) for answer in answers]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint)


def test_the_best_answer_is_the_highest_score_of_those_sampled(model):
    sampling = Sampling(n=4, max_tokens=8, seed=3)
    choice, scores = best_of(Engine(model), model, {"prompt": "say"}, sampling, Rewards((Length(),), (1.0,)))
    texts = [c.text for c in Engine(model).generate([[{"role": "user", "content": "say"}]], sampling)[0].choices]
    assert scores == [len(text) for text in texts] and choice.text == max(texts, key=len)


def test_rejection_sampling_writes_conversations_for_fine_tuning(model, tmp_path):
    rows, out = [{"prompt": f"say {i}"} for i in range(3)], tmp_path / "best.jsonl"
    figures = rejection_sample(model, rows, Rewards((Length(),), (1.0,)), out, Sampling(n=4, max_tokens=6))
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in written] == ["say 0", "say 1", "say 2"]
    assert all(len(row["messages"][1]["content"]) == row["score"] for row in written)
    assert figures["best_score"] >= figures["mean_score"] and figures["prompts"] == 3
    with pytest.raises(DataError, match="lower the threshold"):
        rejection_sample(model, rows, Rewards((Length(),), (1.0,)), out, Sampling(n=2, max_tokens=4), least=1e9)


def test_the_cache_is_as_large_as_the_longest_prompt_and_answer_need(model, tmp_path, monkeypatch):
    """Not as large as the context, which for 512 answers of a small model with 8,192 tokens is more than a GPU has."""
    made = []

    def sampler(*given):
        made.append(given[2:])
        return Sampler(*given)

    monkeypatch.setattr("luban.align.best_of.Sampler", sampler)
    rows = [{"prompt": f"say {10**i}"} for i in range(5)]
    longest = max(len(prompt_ids(row["prompt"], model.need_tokenizer())) for row in rows)
    rejection_sample(model, rows, Rewards((Length(),), (1.0,)), tmp_path / "best.jsonl", Sampling(n=3, max_tokens=6))
    assert made == [(15, longest + 6)] and longest + 6 < model.spec.context


def test_the_divergence_of_best_of_n():
    assert best_of_n_kl(1) == 0 and best_of_n_kl(16) == pytest.approx(1.835, abs=1e-3)
    assert best_of_n_kl(1024) == pytest.approx(5.93, abs=5e-3)
    n, grid = 5, (np.arange(200000) + 0.5) / 200000  # a uniform score: the best of n has density n u^(n − 1)
    density = n * grid ** (n - 1)
    assert best_of_n_kl(n) == pytest.approx(float((density * np.log(density)).mean()), abs=1e-4)


def test_the_expected_best_is_the_mean_over_all_subsets():
    scores = np.random.default_rng(np.random.SeedSequence()).normal(size=7).tolist()
    for n in range(1, 8):
        subsets = [max(s) for s in itertools.combinations(scores, n)]
        assert expected_best(scores, n) == pytest.approx(sum(subsets) / math.comb(7, n))
    with pytest.raises(ValueError, match="from 7 scores"):
        expected_best(scores, 8)
