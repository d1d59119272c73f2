"""`luban sft RECIPE.toml --init MODEL --out RUN`."""

from __future__ import annotations

from collections.abc import Sequence

from luban.cli.training import train_from_recipe

ABOUT = """Tune a model on conversations, from a recipe. The same command resumes an unfinished run; a larger
--train.steps extends a finished one.

--init takes every MODEL that chat takes: a run, a checkpoint, a Hugging Face directory, a GGUF file, smollm2. What is packed
lies in OUT.data/shards-…, which `luban data show` shows with what is trained on (give it --train-on all,
too, where this was). --nproc N and --plan as in luban pretrain."""
EXAMPLES = """
luban sft luban_sft_cpu --init runs/base --data.path conversations --out runs/chat
luban sft luban_sft_cpu --init runs/base --data.path questions.jsonl --out runs/chat --train.steps 200
luban sft luban_lora_cpu --init smollm2 --data.path questions.jsonl --out runs/lora   # an adapter: docs/ADAPTERS.md
luban sft luban_sft_cpu --init smollm2 --data.path calls.jsonl --chat-template tools.jinja --out runs/tools
luban sft luban_sft_cpu --init runs/base --data.path conversations --out runs/two --nproc 2 --plan.shard 2
luban sft luban_sft_cpu --init runs/base --data.path conversations --dry-run   # packs into a temporary folder, keeps nothing
"""


def run(argv: Sequence[str]) -> int:
    from luban.align.sft import SFTRecipe, sft, with_shards

    return train_from_recipe(SFTRecipe, argv, verb="sft", about=ABOUT, examples=EXAMPLES, train=sft, pack=with_shards)
