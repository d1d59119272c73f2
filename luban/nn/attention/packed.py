"""The tokens of one forward over a paged KV cache, packed into a single row, and the sources that they attend to.

N tokens of all sequences, C sequences, M blocks of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedTokens:
    """The tokens of one forward: of every sequence `counts` in a row, the first at position `starts`."""

    positions_N: Tensor  # int64
    slots_N: Tensor  # int64, where their keys and values go
    tables_CM: Tensor  # int32, blocks of every sequence, filled up with any
    starts: tuple[int, ...]
    counts: tuple[int, ...]
    block_size: int
    # the kernel's work (`PagedWork.items`) where it is on the device already, of single tokens and of chunks; `starts` may
    # then be any positions at least as large, and `counts` tell nothing
    single_items: Tensor | None = None
    chunk_items: Tensor | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sequence, the new ones included."""
        return tuple(start + count for start, count in zip(self.starts, self.counts, strict=True))


@dataclass(frozen=True)
class PackedSources:
    """What the packed tokens of an encoder–decoder attend to in the pool: the source of each one's sequence."""

    tables_NM: Tensor  # int32, blocks of every token's source, filled up with any
    lengths: tuple[int, ...]  # N, tokens of it
    new_slots: Tensor | None  # int64, where keys and values of the sources go that this forward encodes; None: of none

    def as_tokens(self, block_size: int) -> PackedTokens:
        """Every packed token as a sequence whose last token it is: it sees the whole source."""
        last = tuple(length - 1 for length in self.lengths)
        return PackedTokens(
            positions_N=torch.tensor(last, device=self.tables_NM.device),
            slots_N=torch.empty(0, dtype=torch.long, device=self.tables_NM.device),  # nothing is stored for a query
            tables_CM=self.tables_NM,
            starts=last,
            counts=(1,) * len(last),
            block_size=block_size,
        )
