"""Ways to lay documents into rows of T tokens. Each is `packing(shards, seq_len)` with `.rows` and `.gather(rows)`."""

from __future__ import annotations

from luban.core.registry import Registry

PACKINGS = Registry(
    "packing",
    {
        "stream": "luban.data.packing.stream:StreamPacking",
        "fit": "luban.data.packing.fit:FitPacking",
    },
)
