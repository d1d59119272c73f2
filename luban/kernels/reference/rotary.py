"""Reference of rotary positions on concatenated queries, keys and values (Su et al. 2021, equation 34).

B batch, T tokens, H query heads, K key heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_packed(packed_BTP: Tensor, cos: Tensor, sin: Tensor, heads: int, key_heads: int) -> tuple[Tensor, ...]:
    """Packed (B, T, (H + 2K)·D) → queries (B, H, T, D), keys and values (B, K, T, D), with queries and keys rotated.

    Args:
        cos, sin: (1 or B, 1, T, D), of the angle of each pair (i, i + D/2).
    """
    D = packed_BTP.shape[-1] // (heads + 2 * key_heads)
    q, k, v = packed_BTP.unflatten(-1, (-1, D)).transpose(1, 2).split([heads, key_heads, key_heads], 1)
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v.clone()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, T, D) rotated; same shape."""
    first, second = x.chunk(2, -1)
    c, s = (table.to(x.dtype).chunk(2, -1)[1] for table in (cos, sin))  # sines of the first half are negated
    return torch.cat([first * c - second * s, second * c + first * s], -1)
