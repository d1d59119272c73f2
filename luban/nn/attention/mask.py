"""Who may look at whom, built once a forward and shared by all layers.

B batch, T queries, S keys, H heads. Slots are places in the row (padding included), positions count real tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from luban.core.protocols import KVCache


class Frame(NamedTuple):
    """What all layers of one forward share."""

    mask: Tensor | None  # (1 or B, 1 or H, T, S) to add to the scores; None: nothing to add
    causal: bool  # the plain causal triangle, which kernels draw themselves; then mask is None
    tables: Any  # of the position method
    cache: KVCache | None  # keys and values of earlier tokens


def score_mask(*, queries: int, keys: int, causal: bool, device: torch.device, dtype: torch.dtype,
               window: int | None = None, real: Tensor | None = None, documents: Tensor | None = None,
               prefix: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor | None, bool]:  # fmt: skip
    """What is added to attention scores, as cheaply as the case allows.

    Args:
        queries, keys: T and S; the queries are the last T of the S slots.
        causal: a query sees no later slot.
        window: a query sees only itself and the `window - 1` slots before it.
        real: (B, S) bool, false where a key is padding.
        documents: (B, T) int, where T = S; a query sees only keys of the same document.
        prefix: (B, T) bool, where T = S; keys that every query of their document sees, later ones too.
        bias: (1 or B, H, T, S) to add where seen.
        dtype: of the result: the precision in which attention will run.

    Returns:
        (mask, causal): (None, True) for a plain triangle, (None, False) where everything is seen, otherwise
        (mask, False) with 0 or the bias where seen and −∞ elsewhere. Every query sees its own slot, padding
        too, so that no row of scores is empty.
    """
    plain = window is None and real is None and documents is None and prefix is None and bias is None
    if plain and (not causal or queries == 1):
        return None, False
    if plain and queries == keys:
        return None, True
    query_slots = torch.arange(keys - queries, keys, device=device)[:, None]
    key_slots = torch.arange(keys, device=device)[None, :]
    seen = key_slots <= query_slots if causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
    if window is not None:
        seen = seen & ((query_slots - key_slots).abs() < window)
    seen = seen[None, None]
    if prefix is not None:
        seen = seen | prefix[:, None, None, :]
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    if real is not None:
        seen = (seen & real[:, None, None, :]) | (key_slots == query_slots)
    added = torch.zeros((), device=device) if bias is None else bias
    return torch.where(seen, added, float("-inf")).to(dtype), False


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision in which products over `x` run: autocast's, where it is on."""
    kind = x.device.type
    cast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if cast else x.dtype
