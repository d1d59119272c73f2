"""Block-sparse layouts: which blocks of keys a block of queries may touch (Child et al. 2019; Zaheer et al. 2020).

H heads, M blocks of queries, N blocks of keys. A layout says nothing of the length: that of a longer row begins with that of
a shorter one (where a query sees no later key), so that what was computed token by token stays right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luban.core.errors import ConfigError


@dataclass(frozen=True, eq=False, init=False)
class BlockLayout:
    """`table[h, m, n]`: block m of queries may see block n of keys. One head serves all.

    Args:
        table: (H or 1, M, N) bool.
        block: side of a block in tokens.
        device: of what is kept; none: the table's.
    """

    table: Tensor  # (H or 1, M, N) bool
    block: int  # side of a block in tokens
    query_list: Tensor  # (H or 1, M, most) int32: the key blocks of each query block, padded
    query_count: Tensor  # (H or 1, M) int32: how many they are
    key_list: Tensor  # (H or 1, N, most): the query blocks that see each key block
    key_count: Tensor  # (H or 1, N)

    def __init__(self, table: Tensor | np.ndarray, block: int = 64, device: torch.device | str | None = None):
        if isinstance(table, Tensor):
            device, table = device or table.device, table.cpu().numpy()
        if table.ndim != 3 or table.dtype != np.bool_:
            raise ConfigError(
                f"a layout is (heads or 1, query blocks, key blocks) of bool, {table.shape} of {table.dtype} given"
            )
        object.__setattr__(self, "block", block)
        arrays = table, *_lists(table), *_lists(table.transpose(0, 2, 1))
        for name, array in zip(("table", "query_list", "query_count", "key_list", "key_count"), arrays, strict=True):
            object.__setattr__(self, name, torch.from_numpy(np.ascontiguousarray(array)).to(device or "cpu"))

    def dense(self, queries: int, keys: int) -> Tensor:
        """(H or 1, T, S) bool, for the last T of S places: for references and tests."""
        return in_blocks(self.table, self.block, torch.arange(keys, device=self.table.device)[None], queries)[0]

    def density(self, causal: bool = True) -> float:
        """Share of the (causal) blocks that are there."""
        size = torch.ones_like(self.table)
        size = size.tril() if causal else size
        return float((self.table & size).sum() / size.sum())


def in_blocks(table_HMN: Tensor, block: int, places_BS: Tensor, queries: int) -> Tensor:
    """(B, H, T, S) bool, what a layout's table leaves of keys at these places for the last T of them."""
    key_blocks = places_BS // block
    query_blocks = key_blocks[:, key_blocks.shape[1] - queries :]
    return table_HMN[:, query_blocks[:, :, None], key_blocks[:, None, :]].transpose(0, 1)


def _lists(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    counts = table.sum(-1, dtype=np.int32)
    order = np.argsort(~table, axis=-1, kind="stable").astype(np.int32)
    return order[..., : max(1, int(counts.max()))], counts


def _near(length: int, window: int, block: int, causal: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(M, 1) and (1, N) numbers of the blocks, and (M, N), whether the second is the first or within `window` of it."""
    if block < 1:
        raise ConfigError(f"a layout's block must have at least one token, {block} given")
    blocks = np.arange(-(-length // block))
    m, n = blocks[:, None], blocks[None, :]
    away = m - n if causal else abs(m - n)
    return m, n, (away >= 0) & (away <= -(-window // block))


def local(
    length: int, window: int, *, block: int = 64, causal: bool = True, device: torch.device | str = "cpu"
) -> BlockLayout:
    """The own block and those that hold the `window` tokens before it (and after it, where not causal)."""
    return BlockLayout(_near(length, window, block, causal)[2][None], block, device)


def strided(
    length: int, window: int, stride: int, *, block: int = 64, causal: bool = True, device: torch.device | str = "cpu"
) -> BlockLayout:
    """Local, and every `stride`-th block, of those before it if causal (Child et al. 2019, section 4.2, “fixed”)."""
    m, n, near = _near(length, window, block, causal)
    reached = (n <= m) | (not causal)
    return BlockLayout((near | (reached & ((n + 1) % stride == 0)))[None], block, device)


def blockwise(
    length: int,
    window: int,
    span: int,
    *,
    block: int = 64,
    causal: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Local, and the own span of `span` tokens and the one before it (and behind it, where not causal; Sun et al. 2022,
    section 3.3)."""
    m, n, near = _near(length, window, block, causal)
    spans = (m * block) // span - (n * block) // span
    reached = (spans >= 0) & (spans <= 1) & (n <= m) if causal else abs(spans) <= 1
    return BlockLayout((near | reached)[None], block, device)


def global_random(
    length: int,
    window: int,
    *,
    first: int,
    random: int,
    seed: int,
    heads: int = 1,
    block: int = 64,
    causal: bool = True,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """Local, the `first` blocks for everyone, and `random` earlier ones a row, drawn for each head (Zaheer et al. 2020).
    Where not causal, the first blocks see everyone in turn, and a block sees those that drew it: the table of a row is the
    corner of a longer row's, which the paper's draw from all blocks of the row isn't."""
    m, n, near = _near(length, window, block, causal)
    sure = near | ((n < first) & ((n <= m) | (not causal)))
    table = np.repeat((sure if causal else sure | (m < first))[None], heads, 0)
    for row in range(table.shape[1]):
        seen = table[:, row, : row + 1]
        draw = np.where(seen, 2.0, np.random.default_rng((seed, row)).random(seen.shape))
        chosen = np.argsort(draw, axis=1)[:, :random]  # those that are seen come last, and are anyway
        np.put_along_axis(seen, chosen, True, 1)
    return BlockLayout(table if causal else table | table.swapaxes(1, 2), block, device)
