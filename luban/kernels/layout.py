"""Block-sparse layouts: which blocks of keys a block of queries may touch (Child et al. 2019; Zaheer et al. 2020).

H heads, M blocks of queries, N blocks of keys. A layout says nothing of the length: that of a longer row begins with that of
a shorter one (where a query sees no later key), so that what was computed token by token stays right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from luban.core.errors import ConfigError


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """`table[h, m, n]`: block m of queries may see block n of keys. One head serves all."""

    table: Tensor  # (H or 1, M, N) bool
    block: int = 64  # side of a block in tokens
    query_list: Tensor = field(init=False)  # (H or 1, M, most) int32: the key blocks of each query block, padded
    query_count: Tensor = field(init=False)  # (H or 1, M) int32: how many they are
    key_list: Tensor = field(init=False)  # (H or 1, N, most): the query blocks that see each key block
    key_count: Tensor = field(init=False)  # (H or 1, N)

    def __post_init__(self):
        if self.table.dim() != 3 or self.table.dtype != torch.bool:
            raise ConfigError(f"a layout is (heads or 1, query blocks, key blocks) of bool, {tuple(self.table.shape)} "
                              f"of {self.table.dtype} given")  # fmt: skip
        lists = *_lists(self.table), *_lists(self.table.transpose(1, 2))
        for name, made in zip(("query_list", "query_count", "key_list", "key_count"), lists, strict=True):
            object.__setattr__(self, name, made)

    def dense(self, queries: int, keys: int) -> Tensor:
        """(H or 1, T, S) bool, for the last T of S places."""
        places = torch.arange(keys, device=self.table.device) // self.block
        return self.table[:, places[keys - queries :]][..., places]

    def density(self, causal: bool = True) -> float:
        """Share of the (causal) blocks that are there."""
        size = torch.ones_like(self.table)
        size = size.tril() if causal else size
        return float((self.table & size).sum() / size.sum())


def _lists(table: Tensor) -> tuple[Tensor, Tensor]:
    counts = table.sum(-1, dtype=torch.int32)
    order = torch.argsort(table.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32)
    return order[..., : max(1, int(counts.max()))].contiguous(), counts.contiguous()


def _near(length: int, window: int, block: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(M, 1) and (1, N) numbers of the blocks, and (M, N), whether the second is the first or within `window` of it."""
    blocks = torch.arange(-(-length // block))
    m, n = blocks[:, None], blocks[None, :]
    away = m - n if causal else (m - n).abs()
    return m, n, (away >= 0) & (away <= -(-window // block))


def local(length: int, window: int, *, block: int = 64, causal: bool = True,
          device: torch.device | str = "cpu") -> BlockLayout:  # fmt: skip
    """The own block and those that hold the `window` tokens before it (and after it, where not causal)."""
    return BlockLayout(_near(length, window, block, causal)[2][None].to(device), block)


def strided(length: int, window: int, stride: int, *, block: int = 64, causal: bool = True,
            device: torch.device | str = "cpu") -> BlockLayout:  # fmt: skip
    """Local, and every `stride`-th block, of those before it if causal (Child et al. 2019, section 4.2, “fixed”)."""
    m, n, near = _near(length, window, block, causal)
    reached = (n <= m) | (not causal)
    return BlockLayout((near | (reached & ((n + 1) % stride == 0)))[None].to(device), block)


def global_random(length: int, window: int, *, first: int, random: int, seed: int, heads: int = 1, block: int = 64,
                  causal: bool = True, device: torch.device | str = "cpu") -> BlockLayout:  # fmt: skip
    """Local, the `first` blocks for everyone, and `random` others a row, drawn for each head (Zaheer et al. 2020). The
    first blocks see everyone in turn, where not causal."""
    m, n, near = _near(length, window, block, causal)
    sure = near | ((n < first) & ((n <= m) | (not causal)))
    if not causal:
        sure = sure | (m < first)
    table = sure.numpy()[None].repeat(heads, 0)
    for row in range(table.shape[1]):
        reach = row + 1 if causal else table.shape[2]
        draw = np.random.default_rng((seed, row)).random((heads, reach))
        draw[table[:, row, :reach]] = 2.0
        chosen = np.argsort(draw, axis=1)[:, :random]
        free = np.take_along_axis(draw, chosen, 1) < 1
        np.put_along_axis(table[:, row, :reach], chosen, free | np.take_along_axis(table[:, row, :reach], chosen, 1), 1)
    return BlockLayout(torch.from_numpy(table).to(device), block)
