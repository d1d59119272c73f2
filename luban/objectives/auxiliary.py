"""A task with language modelling beside it: L_task + λ · L_lm (GPT-1, Radford et al. 2018, equation 5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.data.batch import Batch
from luban.data.packing import PACKINGS, Packing
from luban.data.shards import Shards
from luban.objectives.causal import token_cross_entropy
from luban.objectives.family import Objective
from luban.objectives.rows import Changed


@dataclass(frozen=True, kw_only=True)
class WeightedBatch(Batch):
    """A batch in which every target has a weight; the sum over `loss_mask` divides it."""

    others: np.ndarray  # (B, T) bool: targets of the auxiliary loss
    weights: np.ndarray  # (B,) float32: of the auxiliary loss's sum, the same in all rows

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the loss reads."""
        return (*self.by_token(), self.others, self.weights)


@dataclass(frozen=True, kw_only=True)
class Auxiliary(Objective):
    """The answers of conversations are the task; every token but padding is a target of the language model too.

    Both are means over their own targets, whatever the number of micro-batches.
    """

    weight: float = 0.5  # λ

    bodies = ("decoder",)
    heads = ("language_model",)

    def __post_init__(self):
        if self.weight < 0:
            raise ConfigError(f"the auxiliary loss's weight must be at least 0, {self.weight} given")

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows with both sets of targets. Raises DataError for shards without a task."""
        if not shards.has_mask:
            raise DataError(f"shards {shards.path} hold plain text, so every target is already the language model's: "
                            "the auxiliary objective needs conversations")  # fmt: skip

        return Changed(PACKINGS[packing](shards, seq_len), lambda batch, rows, epochs: self.weigh(batch))

    def weigh(self, batch: Batch) -> WeightedBatch:
        """The batch with the language model's targets, and the weight that makes their sum λ times a mean."""
        follows = batch.documents[:, 1:] == batch.documents[:, :-1]  # the next token is of the same document
        others = (batch.documents >= 0) & (np.pad(follows, ((0, 0), (0, 1))) | batch.loss_mask)
        scale = self.weight * batch.tokens_trained / max(int(others.sum()), 1)
        return WeightedBatch(**vars(batch), others=others, weights=np.full(len(others), scale, dtype=np.float32))

    def loss(self, module: nn.Module, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the task's targets and their count, the weighted sum over all targets added."""
        tokens, targets, loss_mask, documents, positions, others, weights = arrays
        hidden = module(tokens, documents=documents, positions=positions, output="hidden")
        task, count = token_cross_entropy(module, hidden, targets, loss_mask)
        language, _ = token_cross_entropy(module, hidden, targets, others)
        return task + weights[0] * language, count
