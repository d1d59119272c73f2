"""Autoregressive blank infilling (GLM, Du et al. 2022, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.data.batch import Batch
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.objectives.family import Objective
from luban.objectives.prefix import SegmentBatch, segment_loss
from luban.objectives.rows import Pieces, poisson_spans, rounded, stack
from luban.objectives.vocabulary import MASK, START, STOP, Marks


@dataclass(frozen=True, kw_only=True)
class BlankInfilling(Objective):
    """Spans of the text become one mask token each (part A, seen both ways) and are written behind it in random
    order (part B, each token seeing part A and what was written before it)."""

    rate: float = 0.15  # share of the text that is blanked
    mean_span: float = 3.0  # of the Poisson lengths, in tokens

    bodies = ("decoder",)
    heads = ("language_model",)

    def __post_init__(self):
        if not 0 < self.rate < 1 or self.mean_span <= 0:
            raise ConfigError("rate must be between 0 and 1, and mean_span positive")

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Pieces of documents, one a row."""
        return Blanks(self, shards, seq_len, seed)

    def loss(self, module: nn.Module, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of the blanks' tokens and of the token that ends each."""
        return segment_loss(module, *arrays)


@dataclass(frozen=True)
class Filled:
    """One row before it is padded; L tokens."""

    tokens: list[int]
    targets: list[int]
    trained: list[bool]  # part B
    text: list[int]  # first positions: in part A; those of part B are its mask token's
    block: list[int]  # second positions: 0 in part A, from 1 in each blank


def fill_blanks(text: np.ndarray, spans: list[tuple[int, int]], order: list[int], *, mask: int, start: int,
                stop: int) -> Filled:  # fmt: skip
    """Part A and part B of one text.

    Args:
        spans: disjoint [start, stop) in order; `order` is that in which they are written behind the text.
        mask, start, stop: what stands for a blank, what begins its answer, what ends it.
    """
    part_a: list[int] = []
    slots, at = [], 0
    for first, last in spans:
        part_a += [*text[at:first].tolist(), mask]
        slots.append(len(part_a) - 1)
        at = last
    part_a += text[at:].tolist()
    size = len(part_a)
    row = Filled(list(part_a), [stop] * size, [False] * size, list(range(size)), [0] * size)
    for which in order:
        answer = text[slice(*spans[which])].tolist()
        row.tokens.extend([start, *answer])
        row.targets.extend([*answer, stop])
        row.trained.extend([True] * (len(answer) + 1))
        row.text.extend([slots[which]] * (len(answer) + 1))
        row.block.extend(range(1, len(answer) + 2))
    return row


class Blanks(Pieces):
    """A piece and its blanks: n tokens of text with k blanks take n + 2k places."""

    def __init__(self, config: BlankInfilling, shards: Shards, seq_len: int, seed: int):
        share = config.rate / config.mean_span  # blanks a token, on average
        longest = min(int(seq_len / (1 + 3 * share)), seq_len - 2)  # room for half as many more, and for one at least
        super().__init__(shards, longest=longest, shortest=2, seed=seed)
        marks = Marks.of(shards)
        self.config, self.seq_len, self.pad = config, seq_len, marks.pad
        self.marks = {"mask": marks.need(MASK, "mask"), "start": marks.need(START, "start-of-piece"),
                      "stop": marks.need(STOP, "end-of-piece")}  # fmt: skip

    def row(self, row: int, epoch: int) -> Filled:
        """One row as this epoch draws it."""
        rng, text = self.draw("blanks", row, epoch), self.piece(row)
        budget = max(rounded(rng, self.config.rate * len(text)), 1)
        spans = poisson_spans(rng, len(text), budget, self.config.mean_span, (self.seq_len - len(text)) // 2)
        return fill_blanks(text, spans, rng.permutation(len(spans)).tolist(), **self.marks)

    def make(self, places: list[tuple[int, int]]) -> Batch:
        """The batch, padded on the right; positions are (B, 2, T)."""
        rows = [self.row(*place) if place[0] >= 0 else Filled([], [], [], [], []) for place in places]
        positions = np.stack([stack([r.text for r in rows], self.seq_len, 0),
                              stack([r.block for r in rows], self.seq_len, 0)], axis=1)  # fmt: skip
        trained = stack([r.trained for r in rows], self.seq_len, False, bool)
        return SegmentBatch(
            tokens=stack([r.tokens for r in rows], self.seq_len, self.pad),
            targets=stack([r.targets for r in rows], self.seq_len, self.pad), loss_mask=trained,
            documents=stack([[0] * len(r.tokens) for r in rows], self.seq_len, -1, np.int32),
            positions=positions, segments=trained.astype(np.int64),
        )  # fmt: skip
