"""`luban rl RECIPE.toml --init MODEL --data.path PROMPTS.jsonl --reward REWARD --out RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from luban.cli.training import train_from_recipe

ABOUT = """Train a model by rewards: it writes answers to prompts, the engine runs over the weights in training, and answers with
higher rewards are made likelier. The same command resumes an unfinished run, inside of a round too.

PROMPTS.jsonl has a `prompt` (or `question`, or `messages`) a row; a reward sees the whole row. A corpus of
conversations does too, its last answers left out. --reward takes a run of luban
reward, guarded:SAFETY_RM:HELPFULNESS_RM (two of them), judge:MODEL (its grade, from 1 to 10), file.py:function (called with
prompt, answer, row), gsm8k, facts, regex:PATTERN, unit_tests or an http address; several are separated by commas and summed by --reward_weights. --rl.type chooses ppo,
grpo, rloo or quark. RUN/rollouts holds the answers; metrics.jsonl reward, kl, entropy, clipped share, and how far engine and trainer
differ. docs/ALIGNMENT.md has the rest."""
EXAMPLES = """
luban rl luban_rl_cpu --init runs/chat --data.path prompts.jsonl --reward runs/rm --out runs/grpo
luban rl luban_rl_cpu --init runs/chat --data.path prompts.jsonl --reward runs/rm --rl.type ppo --out runs/ppo
luban rl luban_rl_cpu --init runs/chat --data.path prompts.jsonl --reward length.py:short --rl.type rloo --out runs/short
luban rl luban_rl_cpu --init runs/chat --data.path prompts.jsonl --reward guarded:runs/safe:runs/rm --rl.type ppo --out runs/guarded
luban rl luban_rl_gpu --init smollm2 --data.path gsm8k.jsonl --reward gsm8k --out runs/sums
"""


def run(argv: Sequence[str]) -> int:
    from luban.align.rl import RLRecipe, packed, rl

    return train_from_recipe(
        RLRecipe, argv, verb="rl", about=ABOUT, examples=EXAMPLES, train=rl, pack=packed, most_processes=1
    )
