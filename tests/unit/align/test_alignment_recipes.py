"""The shipped recipes of alignment under every loss and method: its own defaults, and nothing said of what it took over; and
what they reach on a planted preference."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

import luban.recipes
from luban import Engine, Sampling
from luban.align.dpo import DPORecipe
from luban.align.policy_config import RL
from luban.align.rl import RLRecipe
from luban.cli.main import main
from luban.core import log
from luban.core.arguments import describe_fields
from luban.core.artifact import read_manifest
from luban.core.config import from_dict, load_toml, override
from luban.load.model import load_model
from luban.objectives.preference import Preference
from luban.objectives.preference_losses import PreferenceLoss

WORDS = ["red", "blue", "green", "small", "large", "old", "new", "fast", "slow", "warm"]


def recipe_of(name, cls, changes):
    path = Path(luban.recipes.__file__).with_name(f"{name}.toml")
    return from_dict(cls, override(load_toml(path), changes))


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("method", PreferenceLoss.registry)
def test_every_preference_loss_has_its_own_defaults(method, device, capsys, monkeypatch):
    monkeypatch.setattr(log, "_warned", set())
    objective = recipe_of(f"luban_dpo_{device}", DPORecipe, [("objective.method.type", method)]).objective
    assert isinstance(objective, Preference)
    assert objective.method == PreferenceLoss.registry[method]()
    assert "from the type before" not in capsys.readouterr().err


@pytest.mark.parametrize("method", RL.registry)
def test_every_method_of_reinforcement_learning_runs_from_the_shipped_recipe(method, capsys, monkeypatch):
    monkeypatch.setattr(log, "_warned", set())
    rl = recipe_of("luban_rl_cpu", RLRecipe, [("rl.type", method)]).rl
    assert dataclasses.replace(rl, max_tokens=64) == RL.registry[method]()
    assert "from the type before" not in capsys.readouterr().err
    recipe_of("luban_rl_gpu", RLRecipe, [("rl.type", method)])


def test_help_leaves_out_what_a_verb_sets_itself():
    shown = {path for path, *_ in describe_fields(RLRecipe)}
    assert {"reward", "reward_weights", "reference", "rl.kl"} <= shown
    assert not {"reward_identity", "reference_identity"} & shown


def picked(rng: random.Random) -> dict[str, str]:
    """A pair of which the answer with the larger number is preferred."""
    words = " ".join(rng.choice(WORDS) for _ in range(5))
    small, large = sorted(rng.sample(range(10, 99), 2))
    return {
        "prompt": f"Pick a number for {words}.",
        "chosen": f"I pick {large}.",
        "rejected": f"I pick {small}.",
    }


@pytest.mark.slow
def test_the_shipped_recipes_learn_a_planted_preference(tmp_path, monkeypatch, capfd):
    """A model that picks numbers evenly between 10 and 98 is tuned on pairs of which the larger number is preferred: a reward
    model tells 90% of the held-out pairs apart, and DPO raises the mean number that is picked by 8."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(7)
    Path("pairs.jsonl").write_text("".join(json.dumps(picked(rng)) + "\n" for _ in range(3000)))
    with open("talks.jsonl", "w") as file:
        for pair in (picked(rng) for _ in range(3000)):
            said = [("user", pair["prompt"]), ("assistant", pair[rng.choice(["chosen", "rejected"])])]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n")
    tuning = "--init base --data.path pairs.jsonl --train.seq_len 64 --train.compile false"
    for words in (
        "corpus build talks.jsonl --out corpus",
        "tokenizer train corpus --out tokenizer --algorithm bpe --vocab-size 400",
        "data pack corpus --tokenizer tokenizer --out shards",
        "pretrain tiny_pretrain_cpu --data.path shards --train.steps 300 --out base",
        f"reward luban_reward_cpu {tuning} --train.steps 300 --out rm",
        f"dpo luban_dpo_cpu {tuning} --train.steps 200 --out tuned",
    ):
        assert main(words.split()) == 0, (words, capfd.readouterr().err)
    assert read_manifest(tmp_path / "rm").figures["accuracy"] >= 0.9
    assert read_manifest(tmp_path / "tuned").figures["heldout_accuracy"] >= 0.8
    prompts = [[{"role": "user", "content": picked(rng)["prompt"]}] for _ in range(240)]
    before, after = (mean_number(Engine(load_model(name)), prompts) for name in ("base", "tuned"))
    assert after > before + 8


def mean_number(engine: Engine, prompts: list) -> float:
    """Of the answers that name one, which are most of them."""
    answers = engine.generate(prompts, Sampling(max_tokens=16, temperature=1, seed=5))
    found = [re.search(r"\d+", answer.text) for answer in answers]
    numbers = [min(int(number.group()), 99) for number in found if number]
    assert len(numbers) >= 200
    return sum(numbers) / len(numbers)
