"""Attention between a piece of the queries and a piece of the keys of rows that are divided among processes.

A block gives mixed values and log-sum-exps of its own keys; its gradients follow from the output and log-sum-exps of all
keys (Dao et al. 2022, FlashAttention, algorithm 4).

B batch, H query heads, K key heads, G = H/K, T queries and S keys of a block, D head dim, C processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from luban.kernels.attention_mask import AttentionMask
from luban.kernels.available import triton_runs
from luban.kernels.intervals import Intervals, seeing_rows

NEVER = float("-inf")
LN2 = math.log(2)


@dataclass(frozen=True)
class Block:
    """A piece of this process's queries and a piece of the keys that are here."""

    queries: slice
    keys: slice
    source: int  # the process that the keys are of


class BlockGradients(NamedTuple):
    """Of one block: (B, H, T, D), (B, K, S, D) twice, and of the scores (B, H, T, S) where a bias wants it."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scores: Tensor | None


@dataclass(frozen=True)
class RingMask:
    """Which keys of whole rows the queries of this process attend to."""

    mask: AttentionMask  # of whole rows
    slots: list[Tensor]  # of the tokens of each process, in two pieces
    rank: int
    bias: (
        Tensor | None
    )  # (1 or B, H, tokens here, all tokens) to add to the scores, the keys of the first process first

    def blocks(self, source: int) -> Iterator[Block]:
        """The blocks between this process's queries and the keys of `source` in which any pair may see each other."""
        size = self.size
        ahead = self.mask.causal and self.mask.prefix is None
        for i, query_piece in enumerate(self._pieces(self.rank)):
            for j, key_piece in enumerate(self._pieces(source)):
                if not (ahead and key_piece > query_piece):
                    yield Block(slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size), source)

    @property
    def size(self) -> int:
        """Tokens of a piece."""
        return len(self.slots[0]) // 2

    def visible(self, block: Block) -> Tensor | None:
        """(1 or B, 1, T, S) bool; None: all pairs."""
        if self.seen_whole(block):
            return None
        return self.mask.between(self.slots[self.rank][block.queries], self.slots[block.source][block.keys])

    def seen_whole(self, block: Block) -> bool:
        """Whether every query of the block sees every key, as far as is known without looking at the tokens."""
        query_piece, key_piece = self._numbers(block)
        return self._plain and (not self.mask.causal or key_piece < query_piece)

    def on_diagonal(self, block: Block) -> bool:
        """Whether the block's mask is the plain causal one."""
        query_piece, key_piece = self._numbers(block)
        return self._plain and self.mask.causal and key_piece == query_piece

    def intervals(self, block: Block) -> Intervals:
        """The keys of the block that each of its queries sees; the mask must not be irregular."""
        _, key_piece = self._numbers(block)
        first, size = key_piece * self.size, self.size
        rows = self.slots[self.rank][block.queries]
        bounds = self._whole_intervals
        start, stop = ((x[:, rows] - first).clamp(0, size).contiguous() for x in (bounds.start, bounds.stop))
        return Intervals(start, stop)

    @cached_property
    def _whole_intervals(self) -> Intervals:
        return self.mask.intervals()

    @property
    def _plain(self) -> bool:
        mask = self.mask
        return mask.window is None and mask.documents is mask.token_mask is mask.prefix is None

    def _pieces(self, rank: int) -> tuple[int, int]:
        return rank, 2 * len(self.slots) - 1 - rank

    def _numbers(self, block: Block) -> tuple[int, int]:
        """Of the block's pieces of queries and keys in the whole row."""
        queries, keys = self._pieces(self.rank), self._pieces(block.source)
        return queries[block.queries.start > 0], keys[block.keys.start > 0]

    def columns(self, block: Block) -> slice:
        """The block's keys in the last dimension of `bias`."""
        first = block.source * len(self.slots[0])
        return slice(first + block.keys.start, first + block.keys.stop)


class WrittenOut:
    """Blocks by matmuls and a softmax in fp32 (fp64 for fp64): any mask and bias, on any device."""

    def __init__(self, mask: RingMask, scale: float):
        self.mask, self.scale = mask, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Mixed values (B, H, T, D), and log-sum-exps (B, H, T), −∞ where a query sees no key of the block."""
        raw = self._scores(q, k, block)
        lse = raw.logsumexp(-1)
        mixed = weights_of(raw, lse) @ v.to(raw.dtype)[:, :, None]
        return mixed.flatten(1, 2), lse.flatten(1, 2)

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
    ) -> BlockGradients:
        """Gradients of a block. `out` (B, H, T, D) and `lse` (B, H, T) are of all keys."""
        raw, groups = self._scores(q, k, block), (k.shape[1], -1)
        wide = raw.dtype
        weights = weights_of(raw, lse.unflatten(1, groups))
        d_mixed, out = (x.to(wide).unflatten(1, groups) for x in (d_out, out))
        delta = (d_mixed * out).sum(-1, keepdim=True)
        d_v = (weights.mT @ d_mixed).sum(2)
        d_raw = weights * (d_mixed @ v.to(wide)[:, :, None].mT - delta)
        d_q = (d_raw @ k.to(wide)[:, :, None] * self.scale).flatten(1, 2)
        d_k = (d_raw.mT @ q.to(wide).unflatten(1, groups)).sum(2) * self.scale
        return BlockGradients(d_q, d_k, d_v, None if self.mask.bias is None else d_raw.flatten(1, 2))

    def _scores(self, q: Tensor, k: Tensor, block: Block) -> Tensor:
        """(B, K, G, T, S), −∞ where a query doesn't attend."""
        wide = torch.promote_types(q.dtype, torch.float32)
        raw = q.to(wide).unflatten(1, (k.shape[1], -1)) @ k.to(wide)[:, :, None].mT * self.scale
        if self.mask.bias is not None:
            part = self.mask.bias[:, :, block.queries, self.mask.columns(block)].to(raw.dtype)
            raw = raw + part.unflatten(1, raw.shape[1:3])
        visible = self.mask.visible(block)
        return raw if visible is None else raw.masked_fill(~visible[:, :, None], NEVER)


class Flash:
    """Blocks by the FlashAttention kernels: no scores in memory."""

    def __init__(self, mask: RingMask, scale: float):
        self.mask, self.scale = mask, scale

    @staticmethod
    def serves(q: Tensor, mask: RingMask) -> bool:
        """Whether the kernels run on these queries and express this mask."""
        plain = mask.bias is None and mask.mask.kind != "irregular"
        if not (plain and triton_runs(q)) or q.dtype == torch.float64:
            return False
        from luban.kernels.flash.attention import WIDEST

        return q.shape[-1] <= WIDEST and not q.shape[-1] % 8  # tiles are fetched by 16 bytes

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """As `WrittenOut.forward`; mixed values in the inputs' dtype."""
        from luban.kernels.flash import launch

        mixed, lse = launch.flash_forward(q, k, v, *self._operands(block, k.shape[2]))
        return mixed, torch.where(lse == torch.inf, NEVER, lse * LN2)

    def backward(
        self, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
    ) -> BlockGradients:
        """As `WrittenOut.backward`."""
        from luban.kernels.flash import launch

        base2 = torch.where(lse == NEVER, torch.inf, lse / LN2)
        operands = (*self._operands(block, k.shape[2]), False)
        d_q, d_k, d_v, _ = launch.flash_backward(d_out, out.to(q.dtype), base2.contiguous(), q, k, v, *operands)
        return BlockGradients(d_q, d_k, d_v, None)

    def _operands(self, block: Block, keys: int) -> tuple:
        """What the kernels take behind queries, keys and values."""
        start = stop = seeing = None
        diagonal = self.mask.on_diagonal(block)
        if not diagonal:
            seen = self.mask.intervals(block)
            start, stop, seeing = seen.start, seen.stop, seeing_rows(seen, keys)
        return *(None,) * 4, start, stop, seeing, *(None,) * 5, "none", 0, 0, 0, diagonal, float(self.scale)


def weights_of(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores − lse), (…, S) and (…), 0 where nothing is seen."""
    return (scores - torch.where(lse == NEVER, 0.0, lse)[..., None]).exp()
