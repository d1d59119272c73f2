"""`luban reward RECIPE.toml --init MODEL --data.path PAIRS.jsonl --out RM`."""

from __future__ import annotations

from collections.abc import Sequence

from luban.cli.training import train_from_recipe

ABOUT = """Train a reward model: the body of --init under a value head, ranking the answers to a prompt. The same command
resumes an unfinished run; a larger --train.steps extends a finished one.

PAIRS.jsonl has a row `prompt`, `chosen`, `rejected` a pair, text or messages; or `prompt`, `responses`, `ranks` (the higher the
better). Optional: `grade` (0, significantly better, to 3, negligibly) and `probability`. 5% of the prompts are held out. At the
end accuracy, calibration and the correlation with length are printed and kept in the manifest; `luban score` uses the model."""
EXAMPLES = """
luban reward luban_reward_cpu --init runs/chat --data.path pairs.jsonl --out runs/rm
luban reward luban_reward_cpu --init runs/chat --data.path graded.jsonl --out runs/rm --objective.margin small
luban reward luban_reward_gpu --init smollm2 --data.path rankings.jsonl --out runs/rm
luban score runs/rm answers.jsonl --out scored.jsonl
"""


def run(argv: Sequence[str]) -> int:
    from luban.align.reward import RewardRecipe, packed, reward

    return train_from_recipe(
        RewardRecipe, argv, verb="reward", about=ABOUT, examples=EXAMPLES, train=reward, pack=packed
    )
