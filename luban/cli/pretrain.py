"""`luban pretrain RECIPE.toml --out RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from luban.cli.elastic import take_place
from luban.cli.training import train_from_recipe

ABOUT = """Train a model from a recipe. The same command resumes an unfinished run; a larger --train.steps extends a finished one.

What doesn't define the result may change when a run is resumed: paths, logging, checkpoints kept, workers, device, kernels,
--train.accumulate, --plan. The manifest notes it. --init MODEL takes the place of the recipe's [model].

--nproc N trains on N devices of this machine: N copies of the model, or divided as --plan.shard, .tensor, .context, .pipeline
and .expert say. `torchrun --nproc-per-node N -m luban pretrain …` starts the same. docs/PARALLEL.md says which to choose; --dry-run tells
memory, messages and waiting of a plan of any size, and with --picture draws its pipeline's schedule.

--elastic.enabled true keeps the run going when workers die, hang, join or leave: an agent replaces lost ones while the others
keep running, and the same command on another machine (or with another --elastic.node) adds workers. docs/ELASTIC.md."""
EXAMPLES = """
luban pretrain tiny_pretrain_cpu --data.path shards --out runs/tiny
luban pretrain luban_pretrain_cpu --data.path shards --out runs/a --optim.type adamw --train.steps 500
luban pretrain luban_pretrain_gpu --data.path shards --dry-run      # memory, time and energy, before anything is taken
luban pretrain luban_pretrain_gpu --data.path shards --out runs/b --train.profile 3 --train.attention luban
luban pretrain tiny_pretrain_cpu --data.path shards --out runs/two --nproc 2 --plan.shard 2
luban pretrain tiny_pretrain_cpu --data.path shards --out runs/three --nproc 2 --elastic.enabled true
luban pretrain luban_multitask_cpu --data.path shards --out runs/both          # two tasks over one model
luban pretrain transformer_translation_cpu --data.path pairs --out runs/zh     # an encoder–decoder; docs/TRAINING.md
luban pretrain tiny_pretrain_cpu --help                                        # every field, as this recipe has it
luban pretrain tiny_pretrain_cpu --data.path shards --dry-run --picture --plan.pipeline 4 --plan.microbatches 8
"""


def run(argv: Sequence[str]) -> int:
    if (code := take_place("pretrain", argv)) is not None:
        return code
    from luban.train.pretrain import pretrain
    from luban.train.recipe import Recipe

    return train_from_recipe(
        Recipe, argv, verb="pretrain", about=ABOUT, examples=EXAMPLES, train=pretrain, elastic=True
    )
