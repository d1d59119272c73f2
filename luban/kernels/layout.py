"""Block-sparse layouts: which blocks of keys a block of queries may touch (Child et al. 2019; Zaheer et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from luban.core.errors import ConfigError


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """`table[h, m, n]`: block m of queries may see block n of keys. One head serves all."""

    table: Tensor  # (H or 1, query blocks, key blocks) bool
    block: int = 64  # B, side of a block in tokens

    def __post_init__(self):
        if self.table.dim() != 3 or self.table.dtype != torch.bool:
            raise ConfigError(f"a layout is (heads or 1, query blocks, key blocks) of bool, {tuple(self.table.shape)} "
                              f"of {self.table.dtype} given")  # fmt: skip

    @lru_cache(maxsize=1)  # noqa: B019 - a layout lives as long as its model
    def by_query(self) -> tuple[Tensor, Tensor]:
        """For each block of queries: its key blocks (padded), and how many there are. int32 both."""
        return _lists(self.table)

    @lru_cache(maxsize=1)  # noqa: B019
    def by_key(self) -> tuple[Tensor, Tensor]:
        """For each block of keys: the query blocks that see it, and how many there are. int32 both."""
        return _lists(self.table.transpose(1, 2))

    def dense(self, queries: int, keys: int) -> Tensor:
        """(H or 1, T, S) bool: for references and tests."""
        return self.table.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)[:, :queries, :keys]

    def density(self, causal: bool = True) -> float:
        """Share of the (causal) blocks that are there."""
        size = torch.ones_like(self.table)
        size = size.tril() if causal else size
        return float((self.table & size).sum() / size.sum())


def _lists(table: Tensor) -> tuple[Tensor, Tensor]:
    counts = table.sum(-1, dtype=torch.int32)
    order = torch.argsort(table.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32)
    return order[..., : max(1, int(counts.max()))].contiguous(), counts.contiguous()


def _places(length: int, block: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    blocks = torch.arange(-(-length // block), device=device)
    return blocks[:, None], blocks[None, :]


def local(length: int, window: int, *, block: int = 64, device: torch.device | str = "cpu") -> BlockLayout:
    """The own block and those that hold the `window` tokens before it."""
    m, n = _places(length, block, device)
    return BlockLayout(((n <= m) & (m - n <= -(-window // block)))[None], block)


def strided(
    length: int, window: int, stride: int, *, block: int = 64, device: torch.device | str = "cpu"
) -> BlockLayout:
    """Local, and every `stride`-th block before it (Child et al. 2019, section 4.2)."""
    m, n = _places(length, block, device)
    table = (n <= m) & ((m - n <= -(-window // block)) | ((n + 1) % stride == 0))
    return BlockLayout(table[None], block)


def global_random(length: int, window: int, *, first: int, random: int, seed: int, heads: int = 1, block: int = 64,
                  device: torch.device | str = "cpu") -> BlockLayout:  # fmt: skip
    """Local, the `first` blocks for everyone, and `random` earlier blocks a row (Zaheer et al. 2020)."""
    m, n = _places(length, block, device)
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(heads, m.shape[0], n.shape[1], generator=generator).to(device)
    draw = draw.masked_fill(n > m, 2.0)
    chosen = torch.zeros_like(draw, dtype=torch.bool).scatter_(-1, draw.argsort(-1)[..., :random], True) & (n <= m)
    return BlockLayout(chosen | ((n <= m) & ((m - n <= -(-window // block)) | (n < first)))[None], block)
