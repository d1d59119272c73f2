"""A forward and a backward language model trained together (ELMo, Peters et al. 2018, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.data.batch import Batch
from luban.data.packing import PACKINGS, Packing
from luban.data.shards import Shards
from luban.objectives.causal import causal_loss
from luban.objectives.family import Objective
from luban.objectives.rows import Changed
from luban.tokenizer.tokenizer import Tokenizer, load_tokenizer

BEGIN, END = 257, 258  # marks around a word's bytes; byte b is id b + 1, padding is 0
SPECIAL = 259  # stands between the marks of any special token


def word_bytes(tokenizer: Tokenizer, length: int) -> np.ndarray:
    """(V, length) int64: the bytes of every token between two marks, cut and padded."""
    table = np.zeros((tokenizer.vocab_size, length), dtype=np.int64)
    special = set(tokenizer.special.values())
    for i in range(tokenizer.vocab_size):
        found = [byte + 1 for byte in tokenizer.decode([i]).encode()][: length - 2]
        word = [BEGIN, SPECIAL, END] if i in special else [BEGIN, *found, END]
        table[i, : len(word)] = word
    return table


@dataclass(frozen=True, kw_only=True)
class Bidirectional(Objective):
    """Every token is predicted from those before it and from those after it; the loss is the mean over both."""

    characters: int = 0  # length of a word for models that make it of its bytes; 0: token ids

    bodies = ("elmo",)
    heads = ("language_model",)

    def __post_init__(self):
        if self.characters < 0 or 0 < self.characters < 3:
            raise ConfigError(
                f"characters must be 0, or at least 3 for a byte between two marks, {self.characters} given"
            )

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows with two targets a token: (B, T, 2), the next and the one before, in the same document."""
        words = word_bytes(load_tokenizer(shards.path / "tokenizer"), self.characters) if self.characters else None

        def change(batch: Batch, rows: np.ndarray, epochs: np.ndarray) -> Batch:
            before = np.roll(batch.tokens, 1, axis=1)
            same = np.roll(batch.documents, 1, axis=1) == batch.documents
            same[:, 0] = False
            trained = np.stack([batch.loss_mask, same & (batch.documents >= 0)], axis=-1)
            targets = np.stack([batch.targets, before], axis=-1)
            tokens = batch.tokens if words is None else words[batch.tokens]
            return Batch(**(vars(batch) | {"tokens": tokens, "targets": targets, "loss_mask": trained}))

        return Changed(PACKINGS[packing](shards, seq_len), change)

    def loss(self, module: nn.Module, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """The body gives (B, T, 2, E), so that each direction meets its own targets under one head."""
        return causal_loss(module, *arrays)
