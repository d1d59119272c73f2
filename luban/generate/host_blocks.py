"""Blocks of keys and values in host memory, which preempted sequences are swapped to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luban.generate.paged_cache import PagedCache


class HostBlocks:
    """Copies of a pool's blocks (Kwon et al. 2023, section 4.5, swapping).

    Args:
        cache: the pool.
        blocks: that host memory holds, of the pool's size.
    """

    def __init__(self, cache: PagedCache, blocks: int):
        self.cache, self.blocks = cache, blocks
        pinned = cache.device.type == "cuda"
        self._pairs = [  # (device, host) of what all layers keep, by blocks
            (part, torch.empty(blocks, *part.shape[1:], dtype=part.dtype, pin_memory=pinned)) for part in cache.parts()
        ]

    def swap_out(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (of the pool, of the host) each."""
        if pairs:
            blocks, kept = _columns(pairs)
            for device, host in self._pairs:
                host[kept] = device[blocks.to(device.device)].to(host.device)

    def swap_in(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks back, (of the host, of the pool) each."""
        if pairs:
            kept, blocks = _columns(pairs)
            for device, host in self._pairs:
                device[blocks.to(device.device)] = host[kept].to(device.device)


def _columns(pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    return torch.tensor(pairs).unbind(1)
