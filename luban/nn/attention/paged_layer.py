"""What a paged KV cache keeps of one layer, in the model's precision or in 8 bits.

K key heads, D head dim, N new tokens, S keys that are read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luban.core.protocols import KeysValues
from luban.nn.float8 import E4M3, by_rows
from luban.nn.mixer.base import AttentionShape


class PagedLayer:
    """Keys and values of one layer, (slots, K, D) both; slot = block · block size + place in the block.

    Args:
        dtype: of the model's keys and values. kept: that they are kept in; float8_e4m3fn: with a scale for every token and head, so
            that the largest of its D numbers is the format's largest. None: as they are.
    """

    def __init__(
        self,
        slots: int,
        shape: AttentionShape,
        device: torch.device,
        dtype: torch.dtype,
        kept: torch.dtype | None = None,
    ):
        self.dtype = dtype
        self.keys = torch.empty(slots, shape.key_heads, shape.head_dim, device=device, dtype=kept or dtype)
        self.values = torch.empty_like(self.keys)
        # (slots, K, 2) of keys and of values
        self.scales = None if kept != E4M3 else torch.ones(slots, shape.key_heads, 2, device=device)

    def write(self, k_NKD: Tensor, v_NKD: Tensor, slots_N: Tensor) -> KeysValues:
        """Keep these in slots; returns them as they will be read."""
        if self.scales is None:
            for pool, new_NKD in ((self.keys, k_NKD), (self.values, v_NKD)):
                pool.index_copy_(0, slots_N, new_NKD if new_NKD.dtype == pool.dtype else new_NKD.to(pool.dtype))
            return k_NKD, v_NKD
        found = []
        for which, (pool, new_NKD) in enumerate(((self.keys, k_NKD), (self.values, v_NKD))):
            rounded, scale = by_rows(new_NKD.flatten(0, 1))  # (N·K, D), (N·K, 1)
            pool.view(torch.uint8).index_copy_(0, slots_N, rounded.view(new_NKD.shape).view(torch.uint8))
            self.scales[slots_N, :, which] = scale.view(new_NKD.shape[:2])
            found.append((rounded.float() * scale).to(new_NKD.dtype).view(new_NKD.shape))
        return found[0], found[1]

    def read(self, slots: slice | Tensor) -> KeysValues:
        """(S, K, D) both, of these slots."""
        pools = self.keys, self.values
        if self.scales is None:
            # index_select copies whole rows: 4 times as fast as indexing on a CPU
            k, v = (x[slots] if isinstance(slots, slice) else x.index_select(0, slots) for x in pools)
            return k, v
        scales_SK2 = self.scales[slots]
        k, v = (
            (x.view(torch.uint8)[slots].view(E4M3).float() * scales_SK2[..., which, None]).to(self.dtype)
            for which, x in enumerate(pools)
        )
        return k, v

    def pools(self) -> list[Tensor]:
        """All that is kept of a slot, by slots; 8-bit numbers as bytes."""
        held = [self.keys, self.values] if self.scales is None else [self.keys, self.values, self.scales]
        return [x.view(torch.uint8) if x.dtype == E4M3 else x for x in held]
