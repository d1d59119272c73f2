"""Batches for encoder–decoders that answer: the source is what stands before a conversation's answer, the target the answer."""

from __future__ import annotations

import numpy as np

from luban.core.errors import DataError
from luban.core.log import say
from luban.data.batch import Batch
from luban.data.collate.source import source_batch
from luban.data.collate.special_tokens import SpecialTokens
from luban.data.shards import Shards


class TextToTextRows:
    """Per conversation one row, without the chat template's special tokens.

    The encoder reads begin, text, end, as generation gives it a text; the decoder writes the answer and its end. Conversations
    longer than a row on either side are left out.

    Args:
        start: id that the decoder begins with.

    Raises:
        DataError: shards without answers, or none that fits.
    """

    def __init__(self, shards: Shards, seq_len: int, *, start: int):
        if shards.mask is None:
            raise DataError(
                f"shards {shards.path} hold plain text: text_to_text learns answers of conversations, "
                "rows of messages that a .jsonl holds"
            )
        self.shards, self.start, self.seq_len, self.special = shards, start, seq_len, SpecialTokens.of(shards)
        kept, answers = [], 0
        for row in range(shards.documents):
            found = self.answers(row)
            answers += max(len(found), 1)
            for begin, stop in found:
                source, target = self.pair(row, begin, stop)
                kept += [(row, begin, stop)] if max(len(source), len(target)) <= seq_len and len(target) > 1 else []
        self.kept, self.rows = np.array(kept, dtype=np.int64).reshape(-1, 3), len(kept)
        if not kept:
            raise DataError(
                f"no {shards.split} conversation of {shards.path} fits into train.seq_len {seq_len} on both sides"
            )
        if left_out := answers - len(kept):
            say(f"{left_out} {shards.split} answers are left out: longer than {seq_len} tokens on a side, or empty")

    def answers(self, row: int) -> list[tuple[int, int]]:
        """(first token, one past the last) of each answer of a conversation."""
        assert self.shards.mask is not None  # checked when this was made
        begin, end = self.shards.offsets[row], self.shards.offsets[row + 1]
        edges = np.flatnonzero(np.diff(self.shards.mask[begin:end].astype(np.int8), prepend=0, append=0))
        return [(int(first), int(stop)) for first, stop in edges.reshape(-1, 2)]

    def pair(self, row: int, begin: int, stop: int) -> tuple[list[int], list[int]]:
        """(source, target) of an answer, token ids: all that stands before it in the conversation, and the answer."""
        first = int(self.shards.offsets[row])
        tokens = self.shards.data[first : first + stop].astype(np.int64)
        text, answer = (
            [int(token) for token in part if not self.special.special[token]]
            for part in (tokens[:begin], tokens[begin:])
        )
        head = [] if self.special.begin is None else [self.special.begin]
        return [*head, *text, self.special.end], [*answer, self.special.end]

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> Batch:
        """The batch of these rows; a negative row is a row of padding."""
        pairs = [self.pair(*self.kept[row].tolist()) if row >= 0 else ([], []) for row in np.asarray(rows)]
        return source_batch(
            [source for source, _ in pairs],
            [target for _, target in pairs],
            start=self.start,
            pad=self.special.pad,
            source_len=self.seq_len,
            target_len=self.seq_len,
        )
