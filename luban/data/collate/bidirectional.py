"""Batches of two targets a token, the next and the one before; words from the bytes of tokens (ELMo)."""

from __future__ import annotations

import numpy as np

from luban.data.batch import Batch
from luban.data.collate.rows import ChangedRows
from luban.data.packing import PACKINGS
from luban.data.shards import Shards
from luban.tokenizer.tokenizer import Tokenizer, load_tokenizer

BEGIN, END = 257, 258  # around a word's bytes; byte b is id b + 1, padding is 0
SPECIAL = 259  # stands between them for any special token


def word_bytes(tokenizer: Tokenizer, length: int) -> np.ndarray:
    """(V, length) int64: the bytes of every token between begin and end, cut and padded."""
    table = np.zeros((tokenizer.vocab_size, length), dtype=np.int64)
    special = set(tokenizer.special.values())
    for i in range(tokenizer.vocab_size):
        found = [byte + 1 for byte in tokenizer.decode([i]).encode()][: length - 2]
        word = [BEGIN, SPECIAL, END] if i in special else [BEGIN, *found, END]
        table[i, : len(word)] = word
    return table


def bidirectional_rows(shards: Shards, *, seq_len: int, packing: str, characters: int) -> ChangedRows:
    """Packed rows with targets (B, T, 2), the next token and the one before, in the same document.

    Args:
        characters: length of a word for models that make it of its bytes; 0: token ids.
    """
    words = word_bytes(load_tokenizer(shards.path / "tokenizer"), characters) if characters else None

    def change(batch: Batch, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        before = np.roll(batch.tokens, 1, axis=1)
        same = np.roll(batch.documents, 1, axis=1) == batch.documents
        same[:, 0] = False
        trained = np.stack([batch.loss_mask, same & (batch.documents >= 0)], axis=-1)
        targets = np.stack([batch.targets, before], axis=-1)
        tokens = batch.tokens if words is None else words[batch.tokens]
        return Batch(**(vars(batch) | {"tokens": tokens, "targets": targets, "loss_mask": trained}))

    return ChangedRows(PACKINGS[packing](shards, seq_len), change)
