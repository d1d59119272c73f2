"""The shipped recipes of alignment under every loss and method: its own defaults, and nothing said of what it took over."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import luban.recipes
from luban.align.dpo import DPORecipe
from luban.align.policy_config import RL
from luban.align.rl import RLRecipe
from luban.core import log
from luban.core.arguments import describe_fields
from luban.core.config import from_dict, load_toml, override
from luban.objectives.preference import Preference
from luban.objectives.preference_losses import PreferenceLoss


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
