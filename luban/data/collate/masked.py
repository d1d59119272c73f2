"""Batches of masked language modelling: some tokens are hidden and predicted from both sides (BERT, RoBERTa, ALBERT)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from luban.core.seeding import generator
from luban.data.batch import Batch
from luban.data.collate.pairing import FOLLOWS, OTHER, Pairing
from luban.data.collate.rows import ChangedRows, DocumentPieces, pad_rows, round_randomly
from luban.data.collate.selection import Selection
from luban.data.collate.special_tokens import MASK, SEPARATOR, SpecialTokens
from luban.data.packing import PACKINGS
from luban.data.shards import Shards


@dataclass(frozen=True, kw_only=True)
class Masking:
    """How tokens are hidden."""

    special: SpecialTokens
    seed: int
    rate: float  # share of the text that is predicted
    masked: float  # share of these that becomes the mask token
    random: float  # share that becomes a random token; the rest stays
    selection: Selection  # which tokens
    copies: int  # different masks of a row, one epoch each and again; 0: a new one every epoch

    def epoch(self, epoch: int) -> int:
        """The epoch whose draws this epoch uses."""
        return epoch % self.copies if self.copies else epoch

    def hide(self, batch: Batch, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        """The batch with tokens hidden; its targets are the tokens that stood there."""
        tokens, chosen = batch.tokens.copy(), np.zeros(batch.tokens.shape, dtype=bool)
        for i, (row, epoch) in enumerate(zip(rows.tolist(), epochs.tolist(), strict=True)):
            if row >= 0:
                rng = generator(self.seed, "mask", row, self.epoch(epoch))
                open_T = (batch.documents[i] >= 0) & ~self.special.special[batch.tokens[i]]
                tokens[i], chosen[i] = self.hide_row(rng, batch.tokens[i], open_T)
        return replace(batch, tokens=tokens, targets=batch.tokens, loss_mask=chosen)

    def hide_row(
        self, rng: np.random.Generator, tokens: np.ndarray, open_T: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens with some hidden, which ones), of those that `open_T` (T,) bool allows. How many is rounded at random,
        so that the mean is exact."""
        budget = round_randomly(rng, self.rate * int(open_T.sum()))
        chosen = self.selection.choose(rng, open_T, self.special.word_starts(tokens), budget)
        places = np.flatnonzero(chosen)
        kind = rng.random(len(places))
        ordinary = np.flatnonzero(~self.special.special)
        hidden = tokens.copy()
        hidden[places[kind < self.masked]] = self.special.need(MASK, "mask")
        other = places[(kind >= self.masked) & (kind < self.masked + self.random)]
        hidden[other] = rng.choice(ordinary, size=len(other))
        return hidden, chosen


def masked_rows(shards: Shards, masking: Masking, *, seq_len: int, packing: str) -> ChangedRows:
    """Packed rows with tokens hidden."""
    return ChangedRows(PACKINGS[packing](shards, seq_len), masking.hide)


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """Rows of two segments."""

    segments: np.ndarray  # (B, T) int64, 0 or 1
    labels: np.ndarray  # (B,) int64: 0 where the second segment follows the first
    weights: np.ndarray  # (B,) float32: hidden tokens a pair, so that dividing by all of them leaves a mean over pairs


class PairRows(DocumentPieces):
    """A piece of a document, cut in two at a random word: class token, first, separator, second, separator."""

    def __init__(self, shards: Shards, masking: Masking, pairing: Pairing, seq_len: int):
        super().__init__(shards, longest=seq_len - 3, shortest=4, seed=masking.seed)
        self.masking, self.pairing, self.special, self.seq_len = masking, pairing, masking.special, seq_len
        self.separator = self.special.need(SEPARATOR, "separator")
        pairing.check(self)

    def pair(self, row: int, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(first, second, class) as this epoch draws them."""
        rng = self.draw("pair", row, self.masking.epoch(epoch))
        piece = self.piece(row)
        words = np.flatnonzero(self.special.word_starts(piece))[1:]
        cut = int(rng.choice(words)) if len(words) else len(piece) // 2
        one, two = piece[:cut], piece[cut:]
        label = int(rng.integers(2))
        if label == OTHER:
            one, two = self.pairing.corrupt(rng, one, two, self, row)
        return one, two, label

    def make(self, places: list[tuple[int, int]]) -> Batch:
        """The batch, padded on the right."""
        rows, segments, labels = [], [], []
        for row, epoch in places:
            if row < 0:
                rows.append([])
                segments.append([])
                labels.append(FOLLOWS)
                continue
            one, two, label = self.pair(row, epoch)
            rows.append([self.special.head, *one, self.separator, *two, self.separator])
            segments.append([0] * (len(one) + 2) + [1] * (len(two) + 1))
            labels.append(label)
        real = pad_rows([np.zeros(len(row)) for row in rows], self.seq_len, -1, np.int32)
        tokens = pad_rows(rows, self.seq_len, self.special.pad)
        positions = np.where(real >= 0, np.arange(self.seq_len), 0).astype(np.int32)
        batch = Batch(tokens=tokens, targets=tokens, loss_mask=real >= 0, documents=real, positions=positions)
        numbers = [np.array(column) for column in zip(*places, strict=True)]
        batch = self.masking.hide(batch, *numbers)
        pairs = max(sum(row >= 0 for row, _ in places), 1)
        weights = np.array([batch.target_count / pairs if row >= 0 else 0 for row, _ in places], dtype=np.float32)
        return PairBatch(
            **vars(batch), segments=pad_rows(segments, self.seq_len, 0), labels=np.array(labels), weights=weights
        )
