"""A forward and a backward language model trained together (ELMo, Peters et al. 2018, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from luban.data.batch import Batch
from luban.data.packing import PACKINGS, Packing
from luban.data.shards import Shards
from luban.objectives.causal import causal_loss
from luban.objectives.family import Objective
from luban.objectives.rows import Changed


@dataclass(frozen=True, kw_only=True)
class Bidirectional(Objective):
    """Every token is predicted from those before it and from those after it; the loss is the mean over both."""

    bodies = ("elmo",)
    heads = ("language_model",)

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows with two targets a token: (B, T, 2), the next and the one before, in the same document."""

        def change(batch: Batch, rows: np.ndarray, epochs: np.ndarray) -> Batch:
            before = np.roll(batch.tokens, 1, axis=1)
            same = np.roll(batch.documents, 1, axis=1) == batch.documents
            same[:, 0] = False
            trained = np.stack([batch.loss_mask, same & (batch.documents >= 0)], axis=-1)
            targets = np.stack([batch.targets, before], axis=-1)
            return Batch(**(vars(batch) | {"targets": targets, "loss_mask": trained}))

        return Changed(PACKINGS[packing](shards, seq_len), change)

    def loss(self, module: nn.Module, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """The body gives (B, T, 2, E), so that each direction meets its own targets under one head."""
        return causal_loss(module, *arrays)
