"""A contiguous cache: one growing block of keys and values a layer, rows padded on the left to one length.

L layers, B sequences, K key heads, S slots, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luban.core.errors import DataError

GROW = 64  # slots are added in steps of at least this many


class ContextError(DataError):
    """More tokens than the model's context holds."""


class ContiguousCache:
    """Keys and values of a batch of sequences; see `core.protocols.KVCache` for how a body uses it.

    Args:
        layers, key_heads, head_dim: the model's shape.
        batch: sequences.
        context: tokens that a sequence may have.
        device, dtype: of keys and values.
    """

    def __init__(self, *, layers: int, key_heads: int, head_dim: int, batch: int, context: int,
                 device: torch.device, dtype: torch.dtype):  # fmt: skip
        self.context, self.length = context, 0
        self.keys = [torch.empty(batch, key_heads, 0, head_dim, device=device, dtype=dtype) for _ in range(layers)]
        self.values = [torch.empty_like(keys) for keys in self.keys]
        self.counts = torch.zeros(batch, dtype=torch.long, device=device)  # real tokens of each sequence
        self.longest = 0  # an upper bound of the counts, known without asking the device
        self._positions = torch.zeros(batch, 0, dtype=torch.long, device=device)
        self._real = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        self.padded = False

    @property
    def batch(self) -> int:
        """Sequences held."""
        return self.counts.shape[0]

    @property
    def positions(self) -> Tensor:
        """(B, S)."""
        return self._positions[:, : self.length]

    @property
    def valid(self) -> Tensor | None:
        """(B, S) bool, or None when nothing is padded."""
        return self._real[:, : self.length] if self.padded else None

    def begin(self, tokens: int, mask: Tensor | None) -> Tensor:
        """Room for `tokens` more in every row; returns their positions (B, T)."""
        if self.longest + tokens > self.context:
            raise ContextError(f"{self.longest + tokens} tokens are more than the model's context of {self.context}")
        if self.length + tokens > self._real.shape[1]:
            self._grow(self.length + tokens)
        new = slice(self.length, self.length + tokens)
        if mask is None:
            steps = torch.arange(tokens, device=self.counts.device)
            positions = self.counts[:, None] + steps
            self.counts = self.counts + tokens
        else:
            positions = (self.counts[:, None] + mask.long().cumsum(-1) - 1).clamp_min(0)
            self.counts = self.counts + mask.sum(-1)
        self.padded = self.padded or mask is not None
        self._positions[:, new] = positions
        self._real[:, new] = True if mask is None else mask
        self.length += tokens
        self.longest += tokens
        return positions

    def _grow(self, needed: int) -> None:
        more = max(needed, min(2 * self._real.shape[1], self._real.shape[1] + 1024), GROW) - self._real.shape[1]
        self.keys = [F.pad(k, (0, 0, 0, more)) for k in self.keys]
        self.values = [F.pad(v, (0, 0, 0, more)) for v in self.values]
        self._positions, self._real = F.pad(self._positions, (0, more)), F.pad(self._real, (0, more))

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) in the slots that `begin` made; return all (B, K, S, D)."""
        start = self.length - keys.shape[2]
        self.keys[layer][:, :, start : self.length] = keys
        self.values[layer][:, :, start : self.length] = values
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def select(self, rows: list[int]) -> None:
        """Keep these sequences, in this order; one may be named more than once. Shared padding is dropped."""
        index = torch.tensor(rows, dtype=torch.long, device=self.counts.device)
        self.counts = self.counts[index]
        self.longest = int(self.counts.max()) if rows else 0
        drop = self.length - self.longest if self.padded else 0  # padding is on the left of every row
        self.keys = [k[index][:, :, drop:] for k in self.keys]
        self.values = [v[index][:, :, drop:] for v in self.values]
        self._positions, self._real = self._positions[index][:, drop:], self._real[index][:, drop:]
        self.length -= drop
        self.padded = self.padded and not bool((self.counts == self.length).all())

    def join(self, other: ContiguousCache) -> None:
        """Take up the sequences of `other` below these, the shorter side padded on the left."""
        length = max(self.length, other.length)
        mine, theirs = length - self.length, length - other.length

        def both(a: Tensor, b: Tensor, slot_axis: int) -> Tensor:
            tail = (0, 0) * (a.dim() - 1 - slot_axis)
            a, b = a.narrow(slot_axis, 0, self.length), b.narrow(slot_axis, 0, other.length)
            return torch.cat((F.pad(a, (*tail, mine, 0)), F.pad(b, (*tail, theirs, 0))))

        self.keys = [both(a, b, 2) for a, b in zip(self.keys, other.keys, strict=True)]
        self.values = [both(a, b, 2) for a, b in zip(self.values, other.values, strict=True)]
        self._positions, self._real = both(self._positions, other._positions, 1), both(self._real, other._real, 1)
        self.padded = self.padded or other.padded or mine != theirs
        self.counts = torch.cat((self.counts, other.counts))
        self.length, self.longest = length, max(self.longest, other.longest)
