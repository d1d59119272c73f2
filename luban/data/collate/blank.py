"""Batches for autoregressive blank infilling (GLM, Du et al. 2022, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luban.data.batch import Batch
from luban.data.collate.prefix import SegmentBatch
from luban.data.collate.rows import DocumentPieces, pad_rows, poisson_spans, round_randomly
from luban.data.collate.special_tokens import MASK, START, STOP, SpecialTokens
from luban.data.shards import Shards


@dataclass(frozen=True)
class FilledRow:
    """One row before it is padded; L tokens."""

    tokens: list[int]
    targets: list[int]
    trained: list[bool]  # part B
    text: list[int]  # first positions: in part A; those of part B are its mask token's
    block: list[int]  # second positions: 0 in part A, from 1 in each blank


def fill_blanks(
    text: np.ndarray, spans: list[tuple[int, int]], order: list[int], *, mask: int, start: int, stop: int
) -> FilledRow:
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
    row = FilledRow(list(part_a), [stop] * size, [False] * size, list(range(size)), [0] * size)
    for which in order:
        answer = text[slice(*spans[which])].tolist()
        row.tokens.extend([start, *answer])
        row.targets.extend([*answer, stop])
        row.trained.extend([True] * (len(answer) + 1))
        row.text.extend([slots[which]] * (len(answer) + 1))
        row.block.extend(range(1, len(answer) + 2))
    return row


class BlankRows(DocumentPieces):
    """A piece and its blanks: n tokens of text with k blanks take n + 2k places.

    Args:
        rate: share of the text that is blanked.
        mean_span: of the Poisson lengths, in tokens.
    """

    def __init__(self, shards: Shards, seq_len: int, seed: int, *, rate: float, mean_span: float):
        share = rate / mean_span  # blanks a token, on average
        longest = min(int(seq_len / (1 + 3 * share)), seq_len - 2)  # room for half as many more, and for one at least
        super().__init__(shards, longest=longest, shortest=2, seed=seed)
        special = SpecialTokens.of(shards)
        self.rate, self.mean_span, self.seq_len, self.pad = rate, mean_span, seq_len, special.pad
        self.special = {
            "mask": special.need(MASK, "mask"),
            "start": special.need(START, "start-of-piece"),
            "stop": special.need(STOP, "end-of-piece"),
        }

    def row(self, row: int, epoch: int) -> FilledRow:
        """One row as this epoch draws it."""
        rng, text = self.draw("blanks", row, epoch), self.piece(row)
        budget = max(round_randomly(rng, self.rate * len(text)), 1)
        spans = poisson_spans(rng, len(text), budget, self.mean_span, (self.seq_len - len(text)) // 2)
        return fill_blanks(text, spans, rng.permutation(len(spans)).tolist(), **self.special)

    def make(self, places: list[tuple[int, int]]) -> Batch:
        """The batch, padded on the right; positions are (B, 2, T)."""
        rows = [self.row(*place) if place[0] >= 0 else FilledRow([], [], [], [], []) for place in places]
        positions = np.stack(
            [pad_rows([r.text for r in rows], self.seq_len, 0), pad_rows([r.block for r in rows], self.seq_len, 0)],
            axis=1,
        )
        trained = pad_rows([r.trained for r in rows], self.seq_len, False, bool)
        return SegmentBatch(
            tokens=pad_rows([r.tokens for r in rows], self.seq_len, self.pad),
            targets=pad_rows([r.targets for r in rows], self.seq_len, self.pad),
            loss_mask=trained,
            documents=pad_rows([[0] * len(r.tokens) for r in rows], self.seq_len, -1, np.int32),
            positions=positions,
            segments=trained.astype(np.int64),
        )
