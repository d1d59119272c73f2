"""Fine-tuning on labelled texts, with language modelling beside it: L_task + λ · L_lm (GPT-1, Radford et al. 2018,
sections 3.2 and 3.3; with λ = 0 also BERT's way, Devlin et al. 2019, section 4.1).

The data are conversations whose answer is the label. A row is what stands before the answer; the token there, which the
chat template puts before every answer, is GPT-1's extract token, and the classes are read off it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from luban.core.errors import ConfigError, DataError
from luban.data.batch import Batch
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.objectives.causal import token_cross_entropy
from luban.objectives.family import Objective
from luban.objectives.rows import stack
from luban.tokenizer.tokenizer import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Labelled(Objective):
    """The class of a text. The language model's loss is over the text itself, by the embedding table."""

    labels: tuple[str, ...] = ()  # what the answers say, class by class
    weight: float = 0.0  # λ of the language model's loss (GPT-1: 0.5)

    bodies = ("decoder", "encoder")
    heads = ("classes",)

    def __post_init__(self):
        if len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"the labels {', '.join(self.labels)} repeat themselves")
        if self.weight < 0:
            raise ConfigError(f"the language model's weight must be at least 0, {self.weight} given")

    def require(self, head: object, *, causal: bool, tied: bool) -> None:
        """A class a label; for the language model a causal body whose table is the output layer too."""
        count = getattr(head, "count", 0)
        if count != len(self.labels):
            raise ConfigError(f"the head has {count} classes and the objective {len(self.labels)} labels: "
                              f"set model.head.count = {len(self.labels)}, or objective.labels")  # fmt: skip
        if causal and getattr(head, "pooling", "") == "first":
            raise ConfigError(
                'the first token of a decoder has seen nothing of the text: set model.head.pooling = "last"'
            )
        if self.weight and not (causal and tied):
            raise ConfigError("the language model's loss reads the embedding table as the output layer of a decoder: "
                              "set objective.weight = 0, or train a decoder with model.tied_head = true")  # fmt: skip

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """A text a row. Raises DataError for shards without answers, or with one that isn't a label."""
        return LabelledTexts(self, shards, seq_len)

    def loss(self, module: Any, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the classes' cross-entropies and how many rows there are, the language model's weighted sum added."""
        tokens, targets, extract, documents, positions, follows, labels, weights = arrays
        mask, real = documents >= 0, extract.any(-1)
        hidden = module(tokens, mask, positions=positions, output="hidden")
        classes = F.cross_entropy(module.head(hidden, mask).float(), labels, reduction="none")
        total = (classes * real).sum()
        if self.weight:
            total = total + weights[0] * token_cross_entropy(module, hidden, targets, follows)[0]
        return total, real.sum()


@dataclass(frozen=True, kw_only=True)
class LabelledBatch(Batch):
    """Texts with their classes; `loss_mask` is true at the extract token, so that its sum counts the rows."""

    follows: np.ndarray  # (B, T) bool: the next token is of the same text
    labels: np.ndarray  # (B,) int64
    weights: np.ndarray  # (B,) float32: of the language model's sum, the same in all rows

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the loss reads."""
        return (*self.by_token(), self.follows, self.labels, self.weights)


class LabelledTexts:
    """What stands before the answer of every conversation, its last `seq_len` tokens, and the answer's class."""

    def __init__(self, config: Labelled, shards: Shards, seq_len: int):
        if shards.mask is None:
            raise DataError(
                f"shards {shards.path} hold plain text: labelled texts are conversations whose answer is the label"
            )
        self.config, self.shards, self.seq_len, self.rows = config, shards, seq_len, shards.documents
        tokenizer = load_tokenizer(shards.path / "tokenizer")
        self.cuts, self.labels = np.zeros(self.rows, dtype=np.int64), np.zeros(self.rows, dtype=np.int64)
        for row in range(self.rows):
            begin, end = shards.offsets[row], shards.offsets[row + 1]
            trained = np.flatnonzero(shards.mask[begin:end])
            answer = tokenizer.decode(
                [i for i in shards.data[begin:end][trained] if i not in tokenizer.stop_ids]
            ).strip()
            if answer not in config.labels:
                raise DataError(f"the {shards.split} conversation {row} of {shards.path} is answered {answer!r}, and "
                                f"objective.labels are {', '.join(map(repr, config.labels))}")  # fmt: skip
            self.cuts[row], self.labels[row] = begin + trained[0], config.labels.index(answer)

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> Batch:
        """The batch of these rows; a negative row is a row of padding."""
        rows, shards, length = np.asarray(rows), self.shards, self.seq_len
        texts = [
            shards.data[max(shards.offsets[r], self.cuts[r] - length) : self.cuts[r]] if r >= 0 else [] for r in rows
        ]
        sizes = np.array([len(text) for text in texts])
        tokens, along = stack(texts, length, shards.pad_id), np.arange(length)
        real, follows = along < sizes[:, None], along < sizes[:, None] - 1
        scale = self.config.weight * (rows >= 0).sum() / max(int(follows.sum()), 1)
        return LabelledBatch(
            tokens=tokens, targets=np.roll(tokens, -1, axis=1), loss_mask=along == sizes[:, None] - 1,
            documents=np.where(real, 0, -1).astype(np.int32), positions=np.where(real, along, 0).astype(np.int32),
            follows=follows, labels=np.where(rows >= 0, self.labels[rows], 0),
            weights=np.full(len(rows), scale, dtype=np.float32))  # fmt: skip
