"""Batches of answers that a policy has written, with what was computed of them.

B answers, T tokens a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from luban.data.batch import Batch
from luban.data.shards import Shards

LOGGED = "log/"  # names of arrays that are only logged begin so
PER_TOKEN = ("old_logprobs", "reference_logprobs", "advantages", "weights", "returns", "old_values")


@dataclass(frozen=True, kw_only=True)
class RolloutBatch(Batch):
    """Prompts with answers, one a row. `loss_mask` is true where the target is a token of the answer."""

    values: dict[str, np.ndarray]  # PER_TOKEN → (B, T) float32
    logged: dict[str, np.ndarray] = field(default_factory=dict)  # name → (B,) float32, a figure of each answer
    pretraining: dict[str, np.ndarray] = field(default_factory=dict)  # arrays of a batch of text, as pretrain_…
    count: float  # that the summed loss of the step is divided by

    def arrays(self) -> dict[str, np.ndarray]:
        """The loss module's inputs by name."""
        own = {name: getattr(self, name) for name in ("tokens", "targets", "loss_mask", "documents", "positions")}
        logged = {LOGGED + name: array for name, array in self.logged.items()}
        return {**own, "document_starts": self.document_starts(), **self.values, **logged, **self.pretraining}

    @property
    def target_count(self) -> float:  # type: ignore[override]
        """What the summed loss of the step is divided by."""
        return self.count


class RolloutRows:
    """Rows of the shape that rollouts have, with prompts of a split for tokens: for predicting memory and time."""

    def __init__(self, shards: Shards, seq_len: int):
        self.shards, self.seq_len, self.rows = shards, seq_len, shards.documents

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> RolloutBatch:
        """Such a batch."""
        shape = (len(rows), self.seq_len)
        tokens = np.full(shape, self.shards.pad_id, dtype=np.int64)
        return RolloutBatch(
            tokens=tokens,
            targets=tokens.copy(),
            loss_mask=np.ones(shape, dtype=bool),
            documents=np.zeros(shape, dtype=np.int32),
            positions=np.broadcast_to(np.arange(self.seq_len, dtype=np.int32), shape).copy(),
            values={name: np.zeros(shape, dtype=np.float32) for name in PER_TOKEN},
            count=1.0,
        )
