"""Ways to lay documents into rows of T tokens. Each is made as `packing(shards, seq_len)`."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from luban.core.registry import Registry
from luban.data.batch import Batch


class Packing(Protocol):
    """Rows of a split, by number."""

    rows: int  # how many hold every document once

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> Batch:
        """The batch of these row numbers, a negative one a row of padding.

        A packing that draws something draws it by the epoch of each row, and is a pure function of both.
        """
        ...


PACKINGS = Registry(
    "packing",
    {
        "stream": "luban.data.packing.stream:StreamPacking",
        "fit": "luban.data.packing.fit:FitPacking",
    },
)
