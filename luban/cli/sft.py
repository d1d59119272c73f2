"""`luban sft RECIPE.toml --init MODEL --out RUN`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from luban.cli.launch import launch
from luban.cli.pretrain import RECIPES
from luban.core.arguments import parse_recipe, without_processes
from luban.core.log import print_result

ABOUT = """Tune a model on conversations, from a recipe. The same command resumes an unfinished run; a larger
--train.steps extends a finished one.

--init takes every MODEL that chat takes: a run, a checkpoint, a Hugging Face directory, a GGUF file, smollm2. What is packed
lies in OUT.data/shards-…, which `luban data show` shows with what is trained on. --nproc N and --plan as in luban pretrain."""
EXAMPLES = """
luban sft luban_sft_cpu --init runs/base --data.path conversations --out runs/chat
luban sft luban_sft_cpu --init runs/base --data.path questions.jsonl --out runs/chat --train.steps 200
luban sft luban_sft_cpu --init smollm2 --data.path calls.jsonl --chat-template tools.jinja --out runs/tools
luban sft luban_sft_cpu --init runs/base --data.path conversations --out runs/two --nproc 2 --plan.shard 2
luban sft luban_sft_cpu --init runs/base --data.path conversations --dry-run   # packs into a temporary folder, keeps nothing
"""


def run(argv: Sequence[str]) -> int:
    from luban.align.sft import SFTRecipe, require_preparable, sft, with_shards
    from luban.parallel.world import World, process_count
    from luban.train.recipe import model_of_init
    from luban.train.run import dry_run

    call = parse_recipe(
        SFTRecipe, argv, verb="sft", about=ABOUT, examples=EXAMPLES, shipped=RECIPES, adapt=model_of_init
    )
    if call.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            ready, model = with_shards(call.recipe, Path(folder))
            dry_run(ready, model, processes=call.processes, picture=call.picture)
        return 0
    if call.processes > 1 and process_count() == 1:
        require_preparable(call.recipe, call.out, call.processes)  # what is wrong is said once
        return launch(["sft", *without_processes(argv)], call.processes)
    print_result(sft(call.recipe, call.out, call.name))
    World.leave()
    return 0
