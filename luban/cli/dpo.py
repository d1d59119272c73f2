"""`luban dpo RECIPE.toml --init MODEL --data.path PAIRS.jsonl --out RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from luban.cli.training import train_from_recipe

ABOUT = """Train a model on preferences, by DPO or its kin. The same command resumes an unfinished run; a larger --train.steps
extends a finished one.

PAIRS.jsonl has a row `prompt`, `chosen`, `rejected` a pair, text or messages; optional: `probability` (a soft label). For kto
also `prompt`, `completion`, `label`. What is packed, and the reference's log-probabilities, lie in OUT.data.
--objective.method.type chooses the loss: dpo, ipo, hinge, kto, orpo, simpo. docs/ALIGNMENT.md says when to use which."""
EXAMPLES = """
luban dpo luban_dpo_cpu --init runs/chat --data.path pairs.jsonl --out runs/dpo
luban dpo luban_dpo_cpu --init runs/chat --data.path pairs.jsonl --out runs/ipo --objective.method.type ipo
luban dpo luban_dpo_cpu --init runs/chat --data.path pairs.jsonl --out runs/cdpo --objective.method.smoothing 0.1
luban dpo luban_dpo_gpu --init smollm2 --data.path pairs.jsonl --dry-run
"""


def run(argv: Sequence[str]) -> int:
    from luban.align.dpo import DPORecipe, dpo, packed

    return train_from_recipe(DPORecipe, argv, verb="dpo", about=ABOUT, examples=EXAMPLES, train=dpo, pack=packed)
