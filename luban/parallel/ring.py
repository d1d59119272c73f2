"""Ring attention (Liu et al. 2023): keys and values go from process to process while each computes with those it has.

Blocks are combined by their log-sum-exps, so that the result is that of one softmax over all keys. In the backward pass keys
and values go round again, and their gradients with them, home to their process.

B batch, H query heads, K key heads, G = H/K, T tokens of a process, D head dim, C processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luban.kernels.attention_mask import AttentionMask

NEVER = float("-inf")


@dataclass(frozen=True)
class Block:
    """A piece of this process's queries and a piece of the keys that are here."""

    queries: slice
    keys: slice
    source: int  # the process that the keys are of


@dataclass(frozen=True)
class RingMask:
    """Which keys of whole rows the queries of this process attend to."""

    mask: AttentionMask  # of whole rows
    slots: list[Tensor]  # (T,) of each process, in two pieces
    rank: int
    bias: Tensor | None  # (1 or B, H, T, C·T) to add to the scores, the keys of the first process first

    def blocks(self, source: int) -> Iterator[Block]:
        """The blocks between this process's queries and the keys of `source` in which any pair may see each other."""
        ranks, size = len(self.slots), len(self.slots[0]) // 2
        ahead = self.mask.causal and self.mask.prefix is None
        for i, query_piece in enumerate((self.rank, 2 * ranks - 1 - self.rank)):
            for j, key_piece in enumerate((source, 2 * ranks - 1 - source)):
                if not (ahead and key_piece > query_piece):
                    yield Block(slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size), source)

    def visible(self, block: Block) -> Tensor | None:
        """(1 or B, 1, T′, S′) bool; None: all pairs."""
        mask = self.mask
        queries, keys = self.slots[self.rank][block.queries], self.slots[block.source][block.keys]
        size = len(self.slots[0]) // 2
        plain = mask.window is None and mask.documents is mask.token_mask is mask.prefix is None
        if plain and (
            not mask.causal or self._piece(block.source, block.keys, size) < self._piece(self.rank, block.queries, size)
        ):
            return None
        return mask.between(queries, keys)

    def _piece(self, rank: int, part: slice, size: int) -> int:
        return rank if part.start == 0 else 2 * len(self.slots) - 1 - rank

    def columns(self, block: Block) -> slice:
        """The block's keys in the last dimension of `bias`."""
        first = block.source * len(self.slots[0])
        return slice(first + block.keys.start, first + block.keys.stop)


@torch.compiler.disable
def ring_attention(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: RingMask, scale: float, group: dist.ProcessGroup
) -> Tensor:
    """softmax(q·kᵀ·scale + bias)·v of the local queries and the keys of all processes, (B, H, T, D)."""
    return _Ring.apply(q_BHTD, k_BKTD, v_BKTD, mask.bias, mask, scale, group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: RingMask,
        scale: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        q_BKGTD = q.to(wide).unflatten(1, (k.shape[1], -1))
        out = torch.zeros_like(q_BKGTD)
        lse = torch.full(out.shape[:-1], NEVER, dtype=wide, device=q.device)
        for source, (keys, values) in _round(torch.stack([k, v]), group):
            for block in mask.blocks(source):
                raw = _scores(q_BKGTD, keys.to(wide), bias, mask, block, scale)
                block_lse = raw.logsumexp(-1)
                mixed = _weights(raw, block_lse) @ values.to(wide)[:, :, None, block.keys]
                joint = torch.logaddexp(lse[..., block.queries], block_lse)
                old, new = (_weights(x, joint, rows=True) for x in (lse[..., block.queries], block_lse))
                out[..., block.queries, :] = out[..., block.queries, :] * old + mixed * new
                lse[..., block.queries] = joint
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.options = mask, scale, group
        return out.flatten(1, 2).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, bias, out, lse = ctx.saved_tensors
        mask, scale, group = ctx.options
        wide = out.dtype
        q_BKGTD, d_out = (x.to(wide).unflatten(1, (k.shape[1], -1)) for x in (q, gradient))
        delta = (d_out * out).sum(-1, keepdim=True)
        d_q = torch.zeros_like(q_BKGTD)
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        d_kv = torch.zeros(2, *k.shape, dtype=wide, device=k.device)
        for source, (keys, values) in _round(torch.stack([k, v]), group):
            for block in mask.blocks(source):
                rows = block.queries
                raw = _scores(q_BKGTD, keys.to(wide), bias, mask, block, scale)
                weights = _weights(raw, lse[..., rows])
                d_mixed = d_out[..., rows, :]
                d_kv[1][:, :, block.keys] += (weights.mT @ d_mixed).sum(2)
                d_raw = weights * (d_mixed @ values.to(wide)[:, :, None, block.keys].mT - delta[..., rows, :])
                d_q[..., rows, :] += d_raw @ keys.to(wide)[:, :, None, block.keys] * scale
                d_kv[0][:, :, block.keys] += (d_raw.mT @ q_BKGTD[..., rows, :]).sum(2) * scale
                if d_bias is not None:
                    summed = d_raw.flatten(1, 2)
                    summed = summed.sum(0, keepdim=True) if d_bias.shape[0] == 1 else summed
                    d_bias[:, :, rows, mask.columns(block)] += summed
            d_kv = _pass_on(d_kv, group)  # with its keys; after the last turn it is home
        d_k, d_v = d_kv
        return d_q.flatten(1, 2).to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_bias, None, None, None


def _scores(q_BKGTD: Tensor, keys: Tensor, bias: Tensor | None, mask: RingMask, block: Block, scale: float) -> Tensor:
    """(B, K, G, T′, S′) scores of a block, −∞ where a query doesn't attend."""
    raw = q_BKGTD[..., block.queries, :] @ keys[:, :, None, block.keys].mT * scale
    if bias is not None:
        part = bias[:, :, block.queries, mask.columns(block)].to(raw.dtype)
        raw = raw + part.unflatten(1, raw.shape[1:3])
    visible = mask.visible(block)
    return raw if visible is None else raw.masked_fill(~visible[:, :, None], NEVER)


def _weights(scores: Tensor, lse: Tensor, *, rows: bool = False) -> Tensor:
    """exp(scores − lse) with a last dimension, 0 where nothing is seen.

    Args:
        rows: scores are of whole rows, like lse.
    """
    lse = torch.where(lse == NEVER, 0.0, lse)[..., None]
    return ((scores[..., None] if rows else scores) - lse).exp()


def _round(held: Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, Tensor]]:
    """(process, its tensor) for every process, this one first; the next is on its way while one is used."""
    rank, ranks = dist.get_rank(group), group.size()
    for turn in range(ranks):
        coming, works = (None, []) if turn == ranks - 1 else _start(held, group)
        yield (rank - turn) % ranks, held
        for work in works:
            work.wait()
        held = held if coming is None else coming


def _start(tensor: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, list[dist.Work]]:
    """Send to the next process of the ring, and receive from the one before."""
    rank, ranks = dist.get_rank(group), group.size()
    coming = torch.empty_like(tensor)
    operations = [
        dist.P2POp(dist.isend, tensor.contiguous(), group=group, group_peer=(rank + 1) % ranks),
        dist.P2POp(dist.irecv, coming, group=group, group_peer=(rank - 1) % ranks),
    ]
    return coming, dist.batch_isend_irecv(operations)


def _pass_on(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    coming, works = _start(tensor, group)
    for work in works:
        work.wait()
    return coming
