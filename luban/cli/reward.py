"""`luban reward RECIPE.toml --init MODEL --data.path PAIRS.jsonl --out RM`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from luban.cli.launch import launch
from luban.cli.pretrain import RECIPES
from luban.core.arguments import parse_recipe, without_processes
from luban.core.log import print_result

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
    from luban.align.reward import RewardRecipe, prepared, reward
    from luban.parallel.world import World, process_count
    from luban.train.recipe import model_of_init
    from luban.train.run import dry_run

    call = parse_recipe(
        RewardRecipe, argv, verb="reward", about=ABOUT, examples=EXAMPLES, shipped=RECIPES, adapt=model_of_init
    )
    if call.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            ready, model = prepared(call.recipe, Path(folder))
            dry_run(ready, model, processes=call.processes, picture=call.picture)
        return 0
    if call.processes > 1 and process_count() == 1:
        return launch(["reward", *without_processes(argv)], call.processes)
    print_result(reward(call.recipe, call.out, call.name))
    World.leave()
    return 0
