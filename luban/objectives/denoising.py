"""Denoising: an encoder reads a spoilt text, a decoder writes the whole text as it was (BART, Lewis et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from luban.data.batch import Batch
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.objectives.causal import token_cross_entropy
from luban.objectives.family import Objective
from luban.objectives.noise import Noise, SentencePermutation, TextInfilling
from luban.objectives.rows import Pieces, stack
from luban.objectives.vocabulary import MASK, Marks


@dataclass(frozen=True, kw_only=True)
class SourceBatch(Batch):
    """A batch for encoder–decoders: `tokens`, `targets` and `loss_mask` are the decoder's, beside the source's."""

    source: np.ndarray  # (B, S) int64, what the encoder reads
    source_mask: np.ndarray  # (B, S) bool, false: padding

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the loss reads."""
        return self.source, self.source_mask, self.tokens, self.targets, self.loss_mask

    @property
    def tokens_read(self) -> int:
        """Real tokens on both sides."""
        return int(self.source_mask.sum()) + int(self.loss_mask.sum())


def source_batch(sources: list[list[int]], targets: list[list[int]], *, start: int, pad: int, source_len: int,
                 target_len: int) -> SourceBatch:  # fmt: skip
    """Rows padded on the right; the decoder reads `start` and then its own targets, one later."""
    read = [[start, *row[:-1]] if row else [] for row in targets]
    trained = stack([[True] * len(row) for row in targets], target_len, False, bool)
    positions = np.broadcast_to(np.arange(target_len, dtype=np.int32), trained.shape)
    return SourceBatch(
        tokens=stack(read, target_len, pad), targets=stack(targets, target_len, pad), loss_mask=trained,
        documents=np.where(trained, 0, -1).astype(np.int32), positions=positions,
        source=stack(sources, source_len, pad), source_mask=stack([[True] * len(s) for s in sources], source_len, False, bool),
    )  # fmt: skip


def source_loss(module: nn.Module, source: Tensor, source_mask: Tensor, tokens: Tensor, targets: Tensor,
                loss_mask: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum, count) of the cross-entropy of what the decoder writes (teacher forcing)."""
    hidden = module(source, tokens, source_mask, output="hidden")
    return token_cross_entropy(module, hidden, targets, loss_mask)


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """BART's: 30% of the tokens in spans of Poisson(3), each one mask token, and sentences in another order."""

    noise: Noise = field(default_factory=lambda: TextInfilling(then=SentencePermutation()))  # what spoils the text

    bodies = ("encoder_decoder",)
    heads = ("language_model",)

    def decoder_start(self, shards: Shards) -> int:
        """What ends a document, as BART's."""
        return shards.config["eos_id"]

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Pieces of documents, one a row."""
        return Spoilt(self, shards, seq_len, seed)

    def loss(self, module: nn.Module, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the whole text."""
        return source_loss(module, *arrays)


class Spoilt(Pieces):
    """Begin, text, end on both sides; the encoder's is spoilt. Inserted masks that no longer fit are cut off."""

    def __init__(self, config: Denoising, shards: Shards, seq_len: int, seed: int):
        super().__init__(shards, longest=seq_len - 2, shortest=2, seed=seed)
        self.config, self.seq_len, self.marks = config, seq_len, Marks.of(shards)
        self.marks.need(MASK, "mask")
        self.begin = [] if self.marks.begin is None else [self.marks.begin]

    def make(self, places: list[tuple[int, int]]) -> Batch:
        """The batch."""
        sources: list[list[int]] = []
        targets: list[list[int]] = []
        for row, epoch in places:
            text = self.piece(row) if row >= 0 else None
            if text is None:
                sources.append([])
                targets.append([])
                continue
            spoilt = self.config.noise(self.draw("noise", row, epoch), text, self.marks)[: self.seq_len - 2]
            sources.append([*self.begin, *spoilt.tolist(), self.marks.end])
            targets.append([*self.begin, *text.tolist(), self.marks.end])
        return source_batch(sources, targets, start=self.config.decoder_start(self.shards), pad=self.marks.pad, source_len=self.seq_len,
                            target_len=self.seq_len)  # fmt: skip
