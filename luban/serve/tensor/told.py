"""Forwards as the first process tells them to the others: which tokens of which sequences, and what changed in their tables."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import numpy as np

from luban.serve.scheduler import Chunk, SequenceState


class Sent(NamedTuple):
    """What the others know of a sequence."""

    number: int
    table: list[int]


class ToldChunk(Chunk):
    """A chunk whose tokens are told instead of looked up in its sequence, of which only the table is known."""

    def __init__(self, state: SequenceState, start: int, tokens: list[int], wanted: int, scored: int):
        super().__init__(state, start, len(tokens), max(0, wanted - 1), scored)
        self._tokens, self._wanted = tokens, wanted

    @property
    def last(self) -> bool:
        """See `Chunk`."""
        return self._wanted > 0

    @property
    def wanted(self) -> int:
        """See `Chunk`."""
        return self._wanted

    @property
    def tokens(self) -> list[int]:
        """See `Chunk`."""
        return self._tokens


class ChunkWriter:
    """Makes messages of forwards. Of a table only what was appended is sent, unless it changed elsewhere."""

    def __init__(self) -> None:
        self._sent: weakref.WeakKeyDictionary[SequenceState, Sent] = weakref.WeakKeyDictionary()
        self._numbers = count()
        self._gone: list[int] = []  # sequences that nobody knows any more

    def write(self, chunks: Sequence[Chunk]) -> bytes:
        """The message of a forward."""
        tables: dict[int, tuple[int, list[int]]] = {}  # number → blocks that stay, and those behind them
        rows, tokens = [], []
        for chunk in chunks:
            state = chunk.state
            if state not in self._sent:
                self._sent[state] = Sent(next(self._numbers), [])
                weakref.finalize(state, self._gone.append, self._sent[state].number).atexit = False
            number, known = self._sent[state]
            if known != state.table or not known:
                kept = len(known) if state.table[: len(known)] == known else 0
                tables[number] = kept, state.table[kept:]
                known[:] = state.table
            rows.append((number, chunk.start, chunk.count, chunk.wanted, chunk.scored))
            tokens += chunk.tokens
        gone, self._gone[:] = list(self._gone), []
        return pickle.dumps((gone, tables, np.array(rows), np.array(tokens)), pickle.HIGHEST_PROTOCOL)


class ChunkReader:
    """Makes chunks of the messages, which must all be read in their order."""

    def __init__(self) -> None:
        self._states: dict[int, SequenceState] = {}

    def read(self, message: bytes) -> list[Chunk]:
        """The chunks of a forward."""
        gone, tables, rows, tokens = pickle.loads(message)
        for number, (kept, blocks) in tables.items():
            state = self._states.setdefault(number, SequenceState([], (number,)))
            state.table[kept:] = blocks
        chunks: list[Chunk] = []
        first, ids = 0, tokens.tolist()
        for number, start, length, wanted, scored in rows.tolist():
            chunks.append(ToldChunk(self._states[number], start, ids[first : first + length], wanted, scored))
            first += length
        for number in gone:
            self._states.pop(number, None)
        return chunks
