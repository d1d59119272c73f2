"""Instruction tuning: the same loop as pretraining, on the answers of conversations and their end tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from luban.align.conversations import as_shards
from luban.core.errors import DataError, UsageError
from luban.data.loader import Loader
from luban.data.shards import Shards
from luban.data.show import coloured, row_tokens
from luban.load.model import load_model
from luban.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luban.train.recipe import Recipe
from luban.train.run import train

SAMPLE_TOKENS = 160  # of the mask's sample


def sft(recipe: Recipe, out: Path, name: str = "sft") -> Path:
    """Tune the model `recipe.init` on conversations into the run `out`, or resume what is unfinished there.

    `recipe.data.path` is shards of conversations, or a corpus or .jsonl of them, which is packed into
    `OUT.data` first. Conversations stay whole (packing "fit").

    Raises:
        UsageError: no model to start from.
        DataError: conversations without a usable loss mask.
    """
    ready = with_shards(recipe, out.with_name(out.name + ".data"))
    show_mask(ready)
    return train(ready, out, task="sft", name=name)


def with_shards(recipe: Recipe, cache: Path) -> Recipe:
    """The recipe with its data packed."""
    if not recipe.init:
        raise UsageError("instruction tuning needs a model to start from: give --init MODEL")
    if not recipe.data.path:
        raise UsageError("no conversations to train on: give --data.path (shards, a corpus, or a .jsonl with messages)")
    tokenizer = load_model(recipe.init).need_tokenizer()
    path = as_shards(Path(recipe.data.path), tokenizer, cache, recipe.train.seed)
    return replace(recipe, data=replace(recipe.data, path=str(path), packing="fit"))


def show_mask(recipe: Recipe) -> None:
    """Print the first row of the first batch, what is trained on between « and ».

    Raises DataError when nothing in that batch is trained on.
    """
    from rich.console import Console

    shards = Shards.open(recipe.data.path)
    batch = Loader(shards, batch_size=recipe.train.batch_size, seq_len=recipe.train.seq_len, seed=recipe.train.seed,
                   packing="fit").batch(0)  # fmt: skip
    if not batch.target_count:
        raise DataError(f"no token of the first batch of {shards.path} is trained on: raise --train.seq_len "
                        f"(now {recipe.train.seq_len}), since answers are cut off")  # fmt: skip
    tokenizer: Tokenizer = load_tokenizer(shards.path / "tokenizer")
    row = int(batch.loss_mask.sum(axis=1).argmax())
    console = Console(stderr=True, highlight=False)
    console.print("What is trained on stands between « and »:", style="dim")
    console.print(coloured(row_tokens(batch, row, tokenizer), SAMPLE_TOKENS), soft_wrap=True)
