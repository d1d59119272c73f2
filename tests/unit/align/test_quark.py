"""Quark: quantiles by counting, answers trained behind the sentence of their quantile, scored behind the plain prompt."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from luban.align.feedback import conditioned_prompt, quantiles_of
from luban.align.policy_config import Quark, Scored
from luban.align.prompts import prompt_ids
from luban.align.rewards.base import Rewards
from luban.align.rl import RLRecipe, rl
from luban.core.artifact import read_manifest
from luban.core.config import from_dict
from luban.core.errors import ConfigError
from luban.objectives.policy_losses import clipped_policy_loss
from luban.optim.schedule.constant import Constant
from luban.tokenizer.tokenizer import load_tokenizer

LETTERS = "def letters(prompt, answer, row):\n    return sum(c in 'abcdefgh' for c in answer) / 8\n"


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path) -> RLRecipe:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    (tmp_path / "reward.py").write_text(LETTERS)
    plain = {
        "init": str(tiny_checkpoint),
        "data": {"path": str(tmp_path / "prompts.jsonl")},
        "reward": [f"{tmp_path / 'reward.py'}:letters"],
        "rl": {"type": "quark", "prompts": 4, "samples": 4, "max_tokens": 8, "kl": 0.01},
        "optim": {"type": "adamw", "lr": 1e-2},
        "train": {"steps": 4, "batch_size": 8, "seq_len": 128, "device": "cpu", "log_every": 1},
        "checkpoint": {"every": 1},
        "validation": {"every": 0},
    }
    return replace(from_dict(RLRecipe, plain), schedule=Constant(warmup=0))


def rounds_of(run: Path) -> list[list[dict]]:
    return [json.loads(file.read_text())["answers"] for file in sorted((run / "rollouts").glob("*.json"))]


def test_quantiles_count_how_much_of_the_pool_is_at_or_below():
    rng = np.random.default_rng()
    for _ in range(50):
        pool, bins = rng.integers(0, int(rng.integers(1, 30)), 40).astype(float), int(rng.integers(2, 8))
        ordered = sorted(pool)
        for score, found in zip(pool, quantiles_of(pool, pool, bins), strict=True):
            borders = [ordered[int(np.ceil(k * (len(pool) - 1) / bins))] for k in range(1, bins)]
            assert found == sum(score >= border for border in borders)
        assert quantiles_of(np.array([pool.max()]), pool, bins) == [bins - 1]


def test_answers_are_trained_behind_the_sentence_of_their_quantile(recipe, tiny_checkpoint, tmp_path, monkeypatch):
    seen = []
    plain_scores = Rewards.scores
    monkeypatch.setattr(Rewards, "scores", lambda self, answers: seen.extend(answers) or plain_scores(self, answers))
    rounds = rounds_of(rl(recipe, tmp_path / "run"))
    tokenizer = load_tokenizer(tiny_checkpoint / "tokenizer")
    assert len(rounds) == 2 and len(seen) == 32
    assert all(answer.prompt_ids == prompt_ids(answer.row["prompt"], tokenizer) for answer in seen)
    pool: list[float] = []
    for number, answers in enumerate(rounds):
        scores = [each["score"] for each in answers]
        pool += scores
        quantiles = quantiles_of(np.array(scores), np.array(pool), 5)
        for answer, quantile, was in zip(answers, quantiles, seen[16 * number :], strict=False):
            assert answer["text"] == was.text
            asked = conditioned_prompt(was.row["prompt"], quantile + 1, 5)
            assert answer["prompt"] == prompt_ids(asked, tokenizer)
            assert f"from 1 to 5: {quantile + 1}." in tokenizer.decode(answer["prompt"])


def test_a_run_interrupted_inside_of_a_round_goes_on_to_the_bit(recipe, tmp_path):
    whole = rl(recipe, tmp_path / "whole")
    rl(replace(recipe, train=replace(recipe.train, steps=3)), tmp_path / "cut")  # a round has two steps
    again = rl(recipe, tmp_path / "cut")
    assert read_manifest(whole).figures["weights_hash"] == read_manifest(again).figures["weights_hash"]
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert not any("engine_difference" in row for row in rows) and {"kl", "entropy"} <= rows[0].keys()


def test_the_loss_has_the_gradient_of_a_negative_log_likelihood():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1)[:, 0]
    mask = np.ones((1, 6), dtype=bool)
    scored = Scored(scores=np.zeros(1), mask=mask, kl=np.zeros((1, 6)), values=np.zeros((1, 6)), beta=0.1)
    advantages = torch.from_numpy(Quark().advantages(scored)[0][0])
    ratio = (logprobs - logprobs.detach()).exp()
    (found,) = torch.autograd.grad(clipped_policy_loss(ratio, advantages, 0.2, 0.2).sum(), logits, retain_graph=True)
    (right,) = torch.autograd.grad(-logprobs.sum(), logits)
    assert torch.allclose(found, right, atol=1e-12)


def test_settings_that_fit_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"leave rl\.kl_target out"):
        Quark(kl_target=6.0)
    with pytest.raises(ConfigError, match=r"leave rl\.importance_cap out"):
        Quark(importance_cap=2.0)
