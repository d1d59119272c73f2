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
        offsets, kept = shards.offsets, []
        for row in range(shards.documents):
            source, target = self.pair(row)
            kept += [row] if max(len(source), len(target)) <= seq_len and len(target) > 1 else []
        self.kept, self.rows = np.array(kept, dtype=np.int64), len(kept)
        if not kept:
            raise DataError(
                f"no {shards.split} conversation of {shards.path} fits into train.seq_len {seq_len} on both sides"
            )
        if left_out := len(offsets) - 1 - len(kept):
            say(
                f"{left_out} {shards.split} conversations are left out: longer than {seq_len} tokens, or without an answer"
            )

    def pair(self, row: int) -> tuple[list[int], list[int]]:
        """(source, target) of a conversation, token ids."""
        assert self.shards.mask is not None  # checked when this was made
        begin, end = self.shards.offsets[row], self.shards.offsets[row + 1]
        assert self.shards.mask is not None  # of conversations
        tokens, trained = self.shards.data[begin:end].astype(np.int64), self.shards.mask[begin:end].astype(bool)
        first = int(trained.argmax()) if trained.any() else len(tokens)
        text = [int(token) for token in tokens[:first] if not self.special.special[token]]
        answer = [int(token) for token in tokens[first:][trained[first:]] if not self.special.special[token]]
        head = [] if self.special.begin is None else [self.special.begin]
        return [*head, *text, self.special.end], [*answer, self.special.end]

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> Batch:
        """The batch of these rows; a negative row is a row of padding."""
        pairs = [self.pair(int(self.kept[row])) if row >= 0 else ([], []) for row in np.asarray(rows)]
        return source_batch(
            [source for source, _ in pairs],
            [target for _, target in pairs],
            start=self.start,
            pad=self.special.pad,
            source_len=self.seq_len,
            target_len=self.seq_len,
        )
