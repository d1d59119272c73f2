"""`luban dpo RECIPE.toml --init MODEL --data.path PAIRS.jsonl --out RUN`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from luban.cli.launch import launch
from luban.cli.pretrain import RECIPES
from luban.core.arguments import parse_recipe, without_processes
from luban.core.log import print_result

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
    from luban.align.dpo import DPORecipe, dpo, prepared
    from luban.parallel.world import World, process_count
    from luban.train.recipe import model_of_init
    from luban.train.run import dry_run

    call = parse_recipe(
        DPORecipe, argv, verb="dpo", about=ABOUT, examples=EXAMPLES, shipped=RECIPES, adapt=model_of_init
    )
    if call.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            ready, model = prepared(call.recipe, Path(folder))
            dry_run(ready, model, processes=call.processes, picture=call.picture)
        return 0
    if call.processes > 1 and process_count() == 1:
        return launch(["dpo", *without_processes(argv)], call.processes)
    print_result(dpo(call.recipe, call.out, call.name))
    World.leave()
    return 0
