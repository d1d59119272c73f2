"""Instruction tuning: the same loop as pretraining, on the answers of conversations and their end tokens."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from luban.align.conversations import as_shards
from luban.core.artifact import MANIFEST, read_manifest
from luban.core.errors import DataError, LineageError, LubanError, TrainingError, UsageError
from luban.core.hashing import data_sha256
from luban.core.resuming import Operational
from luban.core.whole_directory import real_path
from luban.data.loader import Loader
from luban.data.shards import Shards
from luban.data.show import coloured, row_tokens, show_on_stderr
from luban.load.model import LoadedModel, load_model
from luban.parallel.world import process_count
from luban.tokenizer.importing.artifact import replace_template
from luban.tokenizer.template import read_template
from luban.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luban.train.interrupt import Interrupted
from luban.train.recipe import Recipe
from luban.train.run import open_run, train

SAMPLE_TOKENS = 160  # of the mask's sample


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(Recipe):
    """A recipe of instruction tuning."""

    # Jinja file, in place of the template of the model's tokenizer (empty: that one)
    chat_template: Operational[str] = ""

    def require_tokenizer(self, shards: Shards, tokenizer: Tokenizer) -> None:
        """Raise LineageError unless the shards were packed with the vocabulary of `init`, and its template too where the
        recipe has none of its own."""
        if not self.chat_template:
            super().require_tokenizer(shards, tokenizer)
        elif not load_tokenizer(shards.path / "tokenizer").same_vocabulary(tokenizer):
            raise LineageError(
                f"shards {shards.path} were packed with another vocabulary than that of model {self.init}"
            )


def sft(recipe: SFTRecipe, out: Path, name: str = "sft") -> Path:
    """Tune the model `recipe.init` on conversations into the run `out`, or resume what is unfinished there.

    `recipe.data.path` is shards of conversations, or a corpus or .jsonl of them, which is packed into
    `OUT.data` first. Conversations stay whole (packing "fit").

    Raises:
        UsageError: no model to start from.
        DataError: conversations without a usable loss mask.
    """
    cache = cache_of(out)
    before = set(cache.iterdir()) if cache.is_dir() else set()
    try:
        ready, model = prepared(recipe, cache)
        show_mask(ready)
        return train(ready, out, task="sft", name=name, model=model)
    except (TrainingError, Interrupted):
        raise  # the run goes on from what was packed
    except LubanError:
        _remove_new(cache, before)
        raise


def cache_of(out: Path) -> Path:
    """Where what is packed for the run `out` lies."""
    place = out if out.is_symlink() else real_path(out)
    return place.with_name(place.name + ".data")


def prepared(recipe: SFTRecipe, cache: Path) -> tuple[SFTRecipe, LoadedModel]:
    """`with_shards`, by one process of a run after the other: the first packs, the others find its shards."""
    if process_count() == 1:
        return with_shards(recipe, cache)
    cache.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(cache.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return with_shards(recipe, cache)
    finally:
        os.close(lock)


def require_preparable(recipe: SFTRecipe, out: Path, processes: int) -> None:
    """Pack the data and check recipe, data and plan before processes are started. Raises what `sft` would."""
    cache = cache_of(out)
    before = set(cache.iterdir()) if cache.is_dir() else set()
    try:
        ready, model = with_shards(recipe, cache)
        open_run(ready, model, processes)
    except LubanError:
        _remove_new(cache, before)
        raise


def _remove_new(cache: Path, before: set[Path]) -> None:
    """Remove what was packed for a run that was then refused."""
    for entry in set(cache.iterdir()) - before if cache.is_dir() else ():
        shutil.rmtree(entry)
    if cache.is_dir() and not before:
        cache.rmdir()


def with_shards(recipe: SFTRecipe, cache: Path) -> tuple[SFTRecipe, LoadedModel]:
    """The recipe with its data packed in `cache`, and the model that it starts from."""
    if not recipe.init:
        raise UsageError("instruction tuning needs a model to start from: give --init MODEL")
    if not recipe.data.path:
        raise UsageError("no conversations to train on: give --data.path (shards, a corpus, or a .jsonl with messages)")
    model = load_model(recipe.init)
    tokenizer = model.need_tokenizer()
    if recipe.chat_template:
        tokenizer = _with_template(tokenizer, recipe, cache)
    path = as_shards(Path(recipe.data.path), tokenizer, cache, recipe.train.seed)
    return replace(recipe, data=replace(recipe.data, path=str(path), packing="fit")), model


def _with_template(tokenizer: Tokenizer, recipe: SFTRecipe, cache: Path) -> Tokenizer:
    """The model's tokenizer with the recipe's chat template, as an artifact in `cache`."""
    data = Path(recipe.data.path)
    if (data / MANIFEST).is_file() and read_manifest(data).kind == "shards":
        raise UsageError(
            f"{data} is packed already, by the template that its tokenizer had: give --data.path the "
            "conversations, or leave out --chat-template"
        )
    source = read_template(Path(recipe.chat_template))
    out = cache / f"tokenizer-{data_sha256([tokenizer.content_hash, source])[:12]}"
    return load_tokenizer(out) if (out / MANIFEST).is_file() else replace_template(tokenizer, source, out)


def show_mask(recipe: SFTRecipe) -> None:
    """Print the first row of the first batch, what is trained on between « and ».

    Raises DataError when nothing in that batch is trained on.
    """
    shards = Shards.open(recipe.data.path)
    batch = Loader(
        shards, batch_size=recipe.train.batch_size, seq_len=recipe.train.seq_len, seed=recipe.train.seed, packing="fit"
    ).batch(0)
    if not batch.target_count:
        raise DataError(
            f"no token of the first batch of {shards.path} is trained on: raise --train.seq_len "
            f"(now {recipe.train.seq_len}), since answers are cut off"
        )
    row = int(batch.loss_mask.sum(axis=1).argmax())
    tokens = row_tokens(batch, row, load_tokenizer(shards.path / "tokenizer"))
    show_on_stderr("What is trained on stands between « and »:", coloured(tokens, SAMPLE_TOKENS))
