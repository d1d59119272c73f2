"""Prefix language modelling: what is given is seen both ways, what follows is predicted (Raffel et al. 2020, section 3.2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from luban.core.seeding import generator
from luban.data.batch import Batch
from luban.data.packing import PACKINGS, Packing
from luban.data.shards import Shards
from luban.objectives.causal import token_cross_entropy
from luban.objectives.family import Objective
from luban.objectives.rows import Changed


@dataclass(frozen=True, kw_only=True)
class SegmentBatch(Batch):
    """A batch whose segments say which tokens every token of their document sees: those of segment 0."""

    segments: np.ndarray  # (B, T) int64

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the loss reads."""
        return (*self.by_token(), self.segments)


def segment_loss(module: nn.Module, tokens: Tensor, targets: Tensor, loss_mask: Tensor, documents: Tensor,
                 positions: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum, count) of the cross-entropy of trained targets, segment 0 seen both ways."""
    hidden = module(tokens, documents=documents, positions=positions, segments=segments, output="hidden")
    return token_cross_entropy(module, hidden, targets, loss_mask)


@dataclass(frozen=True, kw_only=True)
class PrefixLM(Objective):
    """Each document of a row is cut at a random place, drawn anew every epoch; only what follows the cut is a target."""

    bodies = ("decoder",)
    heads = ("language_model",)

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows with their cuts."""

        def change(batch: Batch, rows: np.ndarray, epochs: np.ndarray) -> Batch:
            segments = np.ones(batch.tokens.shape, dtype=np.int64)
            trained = batch.loss_mask.copy()
            for i, (row, epoch) in enumerate(zip(rows.tolist(), epochs.tolist(), strict=True)):
                rng = generator(seed, "prefix", row, epoch)
                for document in range(int(batch.documents[i].max()) + 1):
                    places = np.flatnonzero(batch.documents[i] == document)
                    if not len(places):
                        continue
                    given = places[: int(rng.integers(1, len(places) + 1))]  # the last of them predicts what follows
                    segments[i, given] = 0
                    trained[i, given[:-1]] = False
            return SegmentBatch(**(vars(batch) | {"loss_mask": trained}), segments=segments)

        return Changed(PACKINGS[packing](shards, seq_len), change)

    def loss(self, module: nn.Module, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of what follows the cuts."""
        return segment_loss(module, *arrays)
