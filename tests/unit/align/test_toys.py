"""Alignment on a toy with a known optimum: answers of eight letters, rewarded by how many are of a … h (best: 1)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_checkpoint

from luban.align.policy_config import GRPO, PPO, RL, RLOO
from luban.align.rl import RLRecipe, rl
from luban.core.config import from_dict
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.optim.schedule.constant import Constant

pytestmark = pytest.mark.slow
PROMPTS = [{"prompt": f"say {i}"} for i in range(16)]


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    spec = uniform(
        vocab_size=272,
        width=32,
        layers=2,
        context=512,
        mixer=Grouped(heads=4, kv_heads=2),
        feedforward=SwiGLU(width=48),
        init=NormalInit(std=0.1),
    )
    return write_checkpoint(tmp_path_factory.mktemp("toy") / "start", spec)


def recipe(start: Path, folder: Path, variant: RL, steps: int) -> RLRecipe:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (folder / "reward.py").write_text(
        'def letters(prompt, answer, row):\n    return sum(c in "abcdefgh" for c in answer) / 8\n'
    )
    plain = {
        "init": str(start),
        "data": {"path": str(folder / "prompts.jsonl")},
        "reward": [f"{folder}/reward.py:letters"],
        "rl": {"max_tokens": 8},
        "optim": {"type": "adamw", "lr": 1e-2, "weight_decay": 0.0},
        "train": {"steps": steps, "batch_size": 64, "seq_len": 64, "device": "cpu", "log_every": 1},
        "checkpoint": {"every": 1000},
        "validation": {"every": 0},
    }
    return replace(from_dict(RLRecipe, plain), rl=variant, schedule=Constant(warmup=0))


def column(run: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize(("kind", "steps"), [(GRPO, 40), (RLOO, 40), (PPO, 100)])
def test_the_best_reward_is_reached(start, tmp_path, kind, steps):
    variant = kind(samples=16, prompts=4, max_tokens=8, kl=0.0)
    rewards = column(rl(recipe(start, tmp_path, variant, steps), tmp_path / "run"), "reward")
    assert rewards[0] < 0.2 and np.mean(rewards[-5:]) >= 0.95


def test_a_large_coefficient_stays_at_the_reference(start, tmp_path):
    runs = []
    for kl in (0.0, 100.0):
        made = recipe(start, tmp_path, RLOO(samples=16, prompts=4, max_tokens=8, kl=kl, max_kl=1e9), 30)
        made = replace(made, optim=replace(made.optim, lr=3e-3))
        runs.append(rl(made, tmp_path / f"run{kl:g}"))
    moved, kept = (np.abs(column(run, "kl")[-5:]).mean() for run in runs)
    assert kept < 0.1 * moved
