"""Reinforcement learning through the trainer: rewards rise, resumption is exact, what is out of bounds stops the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from luban.adapters.lora import LoRA
from luban.align.policy_config import GRPO, PPO, RLOO, Scored
from luban.align.preferences import heldout_prompts
from luban.align.rl import RLRecipe, rl
from luban.checkpoint.manager import CheckpointManager
from luban.core.artifact import read_manifest
from luban.core.config import from_dict
from luban.core.errors import ConfigError, TrainingError, UsageError
from luban.load.model import load_model
from luban.optim.schedule.constant import Constant

COUNT = """
def letters(prompt, answer, row):
    return sum(c in "abcdefgh" for c in answer) / 8
def spread(prompt, answer, row):
    return sum(map(ord, answer)) % 7 / 7
def refuses(prompt, answer, row):
    raise ValueError("never")
"""


@pytest.fixture
def recipe(tiny_checkpoint, tmp_path) -> RLRecipe:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(8)))
    (tmp_path / "reward.py").write_text(COUNT)
    return from_dict(
        RLRecipe,
        {
            "init": str(tiny_checkpoint),
            "data": {"path": str(tmp_path / "prompts.jsonl")},
            "reward": [f"{tmp_path / 'reward.py'}:letters"],
            "rl": {"type": "grpo", "prompts": 2, "samples": 4, "max_tokens": 8, "kl": 0.0},
            "optim": {"type": "adamw", "lr": 1e-2},
            "schedule": {"warmup": 0},
            "train": {"steps": 4, "batch_size": 4, "seq_len": 64, "device": "cpu", "log_every": 1},
            "checkpoint": {"every": 1},
            "validation": {"every": 0},
        },
    )


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_a_run_logs_what_is_asked_and_its_first_ratio_is_1(recipe, tmp_path, kind):
    extra = {"samples": 4, "prompts": 2, "max_tokens": 8, "kl": 0.05}
    variant = {"grpo": GRPO, "rloo": RLOO, "ppo": PPO}[kind](**extra)
    out = rl(replace(recipe, rl=variant, train=replace(recipe.train, steps=2)), tmp_path / "run")
    rows = metrics(out)
    assert {"reward", "kl", "entropy", "clipped_share", "engine_difference", "unfinished"} <= rows[0].keys()
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-4) and rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert rows[0]["engine_difference"] < 1e-4
    assert all(row["ratio_min"] <= row["ratio"] <= row["ratio_max"] for row in rows)
    assert all(row[f"seconds/{phase}"] > 0 for row in rows for phase in ("sampling", "scoring", "reading"))
    kept = json.loads((out / "rollouts" / "round_000000.json").read_text())["answers"]
    assert all(
        len(a["token_kl"]) == len(a["tokens"]) and sum(a["token_kl"]) == pytest.approx(a["kl"], abs=1e-3) for a in kept
    )
    assert load_model(out).spec.head.registry.name_of(type(load_model(out).spec.head)) == "language_model"
    assert read_manifest(out).config["task"] == "rl"


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_interrupted_inside_of_a_round_goes_on_to_the_bit(recipe, tmp_path, kind):
    rl_kind = {"grpo": GRPO(samples=4, prompts=2, max_tokens=8), "ppo": PPO(samples=4, prompts=2, max_tokens=8)}[kind]
    recipe = replace(recipe, rl=rl_kind, schedule=Constant(warmup=0))
    steps = lambda n: replace(recipe, train=replace(recipe.train, steps=n))  # noqa: E731
    whole = rl(steps(6), tmp_path / "whole")
    rl(steps(3), tmp_path / "cut")  # a round has 2 steps, or 4
    again = rl(steps(6), tmp_path / "cut")
    assert read_manifest(whole).figures["weights_hash"] == read_manifest(again).figures["weights_hash"]
    assert [row["reward"] for row in metrics(whole)] == [row["reward"] for row in metrics(again)]


def test_rewards_rise_on_a_toy(recipe, tmp_path):
    rl_kind = GRPO(samples=16, prompts=2, max_tokens=8, kl=0.0)
    recipe = replace(recipe, rl=rl_kind, train=replace(recipe.train, steps=16, batch_size=32))
    rows = metrics(rl(recipe, tmp_path / "run"))
    first, last = (np.mean([row["reward"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert last > first + 0.15


def test_a_reward_that_raises_stops_the_run_without_the_step(recipe, tmp_path):
    recipe = replace(recipe, reward=(f"{tmp_path / 'reward.py'}:refuses",))
    with pytest.raises(TrainingError, match=r"refuses of .*ValueError: never"):
        rl(recipe, tmp_path / "run")


def test_a_policy_out_of_bounds_stops_with_the_last_good_checkpoint_named(recipe, tmp_path):
    recipe = replace(recipe, rl=replace(recipe.rl, max_kl=1e-4), optim=replace(recipe.optim, lr=0.1))
    with pytest.raises(TrainingError, match=r"above rl.max_kl.*step_0") as stopped:
        rl(recipe, tmp_path / "run")
    named = str(stopped.value).partition("Last good checkpoint: ")[2].partition(". Lower")[0]
    assert Path(named).name in {CheckpointManager(Path(named).parents[1]).path(s).name for s in range(1, 5)}


def test_a_bound_that_the_first_model_is_beyond_says_so(recipe, tmp_path):
    recipe = replace(recipe, rl=replace(recipe.rl, min_entropy=50.0))
    with pytest.raises(TrainingError, match="That is so of the model before training: choose another bound"):
        rl(recipe, tmp_path / "run")


def test_the_best_checkpoint_is_told_by_its_reward_and_not_by_a_loss(recipe, tmp_path, capsys):
    rows = "".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(40))  # two are held out
    (tmp_path / "prompts.jsonl").write_text(rows)
    (tmp_path / "reward.py").write_text("def short(prompt, answer, row):\n    return -1 - len(answer)\n")
    still = replace(recipe, optim=replace(recipe.optim, lr=1e-30), reward=(f"{tmp_path / 'reward.py'}:short",))
    run = rl(replace(still, validation=replace(recipe.validation, every=2)), tmp_path / "run")
    heldout = [
        row["heldout_reward"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "heldout_reward" in row
    ]
    assert len(heldout) == 2 and heldout[0] == heldout[1] < -1  # a model that learns nothing: the first is the best
    said = capsys.readouterr().err
    assert f"highest held-out reward was at step 2 ({heldout[0]:.3f}); loading the run loads that checkpoint" in said
    assert "held-out loss" not in said
    assert recipe.rl.objective().told({"loss": 0.1, "reward": 0.5, "kl": 0.25}) == "reward 0.500  kl 0.250"


def test_settings_that_fit_nothing_are_refused(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"multiple of train\.batch_size"):
        replace(recipe, train=replace(recipe.train, batch_size=3))
    with pytest.raises(ConfigError, match=r"below train\.seq_len"):
        replace(recipe, rl=replace(recipe.rl, max_tokens=64))
    with pytest.raises(ConfigError, match=r"no KL divergence from a reference is measured: leave --reference out"):
        replace(recipe, reference="model")
    with pytest.raises(ConfigError, match="at least 2"):
        RLOO(samples=1)
    with pytest.raises(UsageError, match="no reward"):
        rl(replace(recipe, reward=()), tmp_path / "run")


def test_the_reference_of_an_adapter_is_its_base_without_a_second_copy(recipe, tmp_path, monkeypatch):
    file = recipe.reward[0].partition(":")[0]
    tuned = replace(recipe, adapter=LoRA(rank=2), rl=replace(recipe.rl, kl=0.1), reward=(f"{file}:spread",))
    copied = metrics(rl(replace(tuned, reference=recipe.init), tmp_path / "copied"))
    monkeypatch.setattr("luban.align.rl.load_reference", lambda *_: pytest.fail("a second copy"))
    found = metrics(rl(tuned, tmp_path / "live"))
    assert [row["kl"] for row in found] == pytest.approx([row["kl"] for row in copied], abs=1e-6)
    assert found[0]["kl"] == 0 and found[-1]["kl"] > 1e-3
    with pytest.raises(ConfigError, match=r"set adapter\.dropout and train\.neftune to 0"):
        rl(replace(tuned, adapter=LoRA(rank=2, dropout=0.1)), tmp_path / "run")


def test_normalisations_of_grpo():
    mask = np.array([[True, True, False, False], [True, False, False, False]])
    assert GRPO().token_weights(mask).sum(-1).tolist() == [1.0, 1.0]
    assert GRPO(normalise="token").token_weights(mask).sum() == 3
    constant = GRPO(normalise="constant", max_tokens=4)
    weights = constant.token_weights(mask)
    assert weights.sum() == pytest.approx(3 / 4) and constant.divisor(weights) == 2
    assert GRPO().divisor(GRPO().token_weights(mask)) == 2 and RLOO().divisor(RLOO().token_weights(mask)) == 3


def test_rloo_penalises_the_divergence_of_the_whole_answer():
    mask = np.ones((2, 3), dtype=bool)
    kl = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    scored = Scored(scores=np.array([1.0, 0.0]), mask=mask, kl=kl, values=np.zeros((2, 3)), beta=0.25)
    advantages, _ = RLOO(samples=2).advantages(scored)
    assert advantages[0].tolist() == [0.5] * 3 and advantages[1].tolist() == [-0.5] * 3


def test_prompts_of_which_none_is_held_out_are_said_once(recipe, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    prompts = [f"say {i}" for i in range(3)]
    assert not heldout_prompts(prompts, recipe.train.seed)
    few.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    recipe = replace(recipe, data=replace(recipe.data, path=str(few)), validation=replace(recipe.validation, every=1))
    out = rl(replace(recipe, train=replace(recipe.train, steps=1)), tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count("without validation") == 1 and "held-out reward" not in said and "they are too few" in said
    assert "heldout_reward" not in metrics(out)[-1]
