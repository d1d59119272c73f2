"""Alignment on a toy with a known optimum: answers of eight letters, rewarded by how many are of a … h (best: 1)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import write_checkpoint

from luban.align.best_of import rejection_sample
from luban.align.dpo import DPORecipe, dpo
from luban.align.policy_config import GRPO, PPO, RL, RLOO
from luban.align.rewards.base import Rewards
from luban.align.rl import RLRecipe, rl
from luban.core.config import from_dict
from luban.load.model import load_model
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.optim.schedule.constant import Constant

pytestmark = pytest.mark.slow
PROMPTS = [{"prompt": f"say {i}"} for i in range(16)]


class Letters:
    name = "letters"

    def scores(self, answers):
        return [sum(c in "abcdefgh" for c in answer.text) / 8 for answer in answers]


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


@pytest.mark.parametrize("kind", [PPO, RLOO])
def test_a_large_coefficient_stays_at_the_reference(start, tmp_path, kind):
    free, tied = (
        rl(
            recipe(start, tmp_path, kind(samples=16, prompts=4, max_tokens=8, kl=kl, max_kl=1e9), 30),
            tmp_path / f"run{kl:g}",
        )
        for kl in (0.0, 100.0)
    )
    moved, kept = (np.abs(column(run, "kl")[-5:]).mean() for run in (free, tied))
    assert kept < 0.1 * moved


def test_labels_of_fresh_answers_beat_those_of_old_ones(start, tmp_path):
    """Four rounds of collecting labels and training on them (Bai et al. 2022, section 4.5), three seeds."""
    differences = []
    for seed in range(3):
        reached = {}
        for fresh in (True, False):
            model = start
            for number in range(4):
                folder = tmp_path / f"{seed}{fresh}{number}"
                folder.mkdir()
                answering = load_model(model if fresh else start)
                rewards = Rewards((Letters(),), (1.0,))
                rejection_sample(
                    answering,
                    PROMPTS * 4,
                    rewards,
                    folder / "pairs.jsonl",
                    n=8,
                    max_tokens=8,
                    seed=100 * seed + number,
                    pairs=True,
                )
                plain = {
                    "init": str(model),
                    "data": {"path": str(folder / "pairs.jsonl")},
                    "optim": {"type": "adamw", "lr": 3e-3, "weight_decay": 0.0},
                    "train": {"steps": 15, "batch_size": 16, "seq_len": 64, "device": "cpu", "seed": seed},
                    "checkpoint": {"every": 1000},
                    "validation": {"every": 0},
                }
                model = dpo(from_dict(DPORecipe, plain), folder / "run")
            figures = rejection_sample(
                load_model(model), PROMPTS, Rewards((Letters(),), (1.0,)), tmp_path / "last.jsonl", n=16, max_tokens=8
            )
            reached[fresh] = figures["mean_score"]
        differences.append(reached[True] - reached[False])
    assert min(differences) > 0


def test_a_pretraining_mix_gives_less_of_the_language_model_up(start, tmp_path):
    """InstructGPT's γ: at least half of the loss on text that is given up without it is kept."""
    from luban.corpus.build import build_corpus
    from luban.corpus.reader import read_corpus
    from luban.data.pack import pack
    from luban.data.shards import Shards
    from luban.train.pretrain import pretrain
    from luban.train.recipe import Recipe

    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"river hill {i} wind over the old red sun " * 12)
    build_corpus([str(tmp_path / "text")], tmp_path / "corpus", heldout=0.2, steps=[])
    splits = {split: read_corpus(tmp_path / "corpus", split) for split in ("train", "heldout")}
    pack(splits, start / "tokenizer", tmp_path / "shards")
    plain = {
        "init": str(start),
        "data": {"path": str(tmp_path / "shards")},
        "optim": {"type": "adamw", "lr": 1e-2},
        "train": {"steps": 60, "batch_size": 8, "seq_len": 64, "device": "cpu"},
        "checkpoint": {"every": 1000},
        "validation": {"every": 0},
    }
    base = pretrain(from_dict(Recipe, plain), tmp_path / "base")
    text = torch.from_numpy(Shards.open(tmp_path / "shards", "heldout").document(0)[:65].astype(np.int64))

    def loss(path: Path) -> float:
        with torch.no_grad():
            logits = load_model(path).module(text[None, :-1])
        return float(torch.nn.functional.cross_entropy(logits[0].double(), text[1:]))

    common = {"samples": 16, "prompts": 4, "max_tokens": 8, "kl": 0.0}
    alone = rl(recipe(base, tmp_path, GRPO(**common), 40), tmp_path / "alone")
    mixed_recipe = recipe(base, tmp_path, GRPO(**common, pretrain=str(tmp_path / "shards"), pretrain_weight=1.0), 40)
    mixed = rl(mixed_recipe, tmp_path / "mixed")
    before, given_up, kept = loss(base), loss(alone), loss(mixed)
    assert given_up > before + 0.1
    assert kept - before <= 0.5 * (given_up - before)
