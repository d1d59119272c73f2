"""Batches of labelled texts: conversations whose answer is the label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luban.core.errors import DataError
from luban.data.batch import Batch
from luban.data.collate.rows import pad_rows
from luban.data.shards import Shards
from luban.tokenizer.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class LabelledBatch(Batch):
    """Texts with their classes; `loss_mask` is true at the extract token, so that its sum counts the rows."""

    follows: np.ndarray  # (B, T) bool: the next token is of the same text
    labels: np.ndarray  # (B,) int64
    weights: np.ndarray  # (B,) float32: of the language model's sum, the same in all rows


class LabelledRows:
    """Per conversation: the last `seq_len` tokens before the answer, and the answer's class.

    Args:
        labels: what the answers say, class by class.
        weight: of the language model's loss.

    Raises:
        DataError: shards without answers, or with one that isn't a label.
    """

    def __init__(self, shards: Shards, seq_len: int, *, labels: Sequence[str], weight: float):
        if shards.mask is None:
            raise DataError(
                f"shards {shards.path} hold plain text: labelled texts are conversations whose answer is the label"
            )
        self.weight, self.shards, self.seq_len, self.rows = weight, shards, seq_len, shards.documents
        tokenizer = load_tokenizer(shards.path / "tokenizer")
        self.cuts, self.labels = np.zeros(self.rows, dtype=np.int64), np.zeros(self.rows, dtype=np.int64)
        for row in range(self.rows):
            begin, end = shards.offsets[row], shards.offsets[row + 1]
            trained = np.flatnonzero(shards.mask[begin:end])
            answer = tokenizer.decode(
                [i for i in shards.data[begin:end][trained] if i not in tokenizer.stop_ids]
            ).strip()
            if answer not in labels:
                raise DataError(
                    f"the {shards.split} conversation {row} of {shards.path} is answered {answer!r}, and "
                    f"objective.labels are {', '.join(map(repr, labels))}"
                )
            self.cuts[row], self.labels[row] = begin + trained[0], list(labels).index(answer)

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> Batch:
        """The batch of these rows; a negative row is a row of padding."""
        rows, shards, length = np.asarray(rows), self.shards, self.seq_len
        texts = [
            shards.data[max(shards.offsets[r], self.cuts[r] - length) : self.cuts[r]] if r >= 0 else [] for r in rows
        ]
        sizes = np.array([len(text) for text in texts])
        tokens, along = pad_rows(texts, length, shards.pad_id), np.arange(length)
        real, follows = along < sizes[:, None], along < sizes[:, None] - 1
        scale = self.weight * (rows >= 0).sum() / max(int(follows.sum()), 1)
        return LabelledBatch(
            tokens=tokens,
            targets=np.roll(tokens, -1, axis=1),
            loss_mask=along == sizes[:, None] - 1,
            documents=np.where(real, 0, -1).astype(np.int32),
            positions=np.where(real, along, 0).astype(np.int32),
            follows=follows,
            labels=np.where(rows >= 0, self.labels[rows], 0),
            weights=np.full(len(rows), scale, dtype=np.float32),
        )
