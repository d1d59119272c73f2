"""Instruction tuning: the same loop as pretraining, on the answers of conversations and their end tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from luban.align.conversations import as_shards
from luban.align.start import model_of, one_after_another, packed_beside
from luban.core.artifact import MANIFEST, read_manifest
from luban.core.errors import DataError, LineageError, UsageError
from luban.core.hashing import data_sha256
from luban.core.resuming import Operational
from luban.data.loader import Loader
from luban.data.shards import Shards
from luban.data.show import coloured, row_tokens, show_on_stderr
from luban.load.model import LoadedModel
from luban.tokenizer.importing.artifact import replace_template
from luban.tokenizer.template import read_template
from luban.tokenizer.tokenizer import Tokenizer, load_tokenizer
from luban.train.recipe import Recipe
from luban.train.run import train

SAMPLE_TOKENS = 160  # of the mask's sample


@dataclass(frozen=True, kw_only=True)
class SFTRecipe(Recipe):
    """A recipe of instruction tuning."""

    # Jinja file, in place of the template of the model's tokenizer (empty: that one)
    chat_template: Operational[str] = ""
    # the assistant's tokens, or questions and instructions too; held-out loss is that of the assistant's either way
    train_on: Literal["answers", "all"] = "answers"

    def trained(self, shards: Shards) -> Shards:
        """Without the mask of answers where all is trained on."""
        return replace(shards, mask=None) if self.train_on == "all" else shards

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
    with packed_beside(out) as cache:
        ready, model = one_after_another(cache, lambda: with_shards(recipe, cache))
        show_mask(ready)
        return train(ready, out, task="sft", name=name, model=model)


def with_shards(recipe: SFTRecipe, cache: Path) -> tuple[SFTRecipe, LoadedModel]:
    """The recipe with its data packed in `cache`, and the model that it starts from."""
    model = model_of(recipe, "instruction tuning", "CONVERSATIONS (shards, a corpus, or a .jsonl with messages)")
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
    shards = recipe.trained(Shards.open(recipe.data.path))
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
