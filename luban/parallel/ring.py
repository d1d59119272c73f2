"""Ring attention (Liu et al. 2023): keys and values go from process to process while each computes with those it has.

Blocks are combined by their log-sum-exps, so that the result is that of one softmax over all keys. In the backward pass keys
and values go round again, and their gradients one turn behind them, home to their process.

B batch, H query heads, K key heads, T tokens of a process, D head dim, C processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luban.parallel.point_to_point import PointToPoint
from luban.parallel.ring_blocks import NEVER, Flash, RingMask, WrittenOut, weights_of


@torch._disable_dynamo  # torch.compiler.disable, which would import all of torch._dynamo now
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
        ring = PointToPoint(group)
        kernel = Flash(mask, scale) if Flash.serves(q, mask) else WrittenOut(mask, scale)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:-1], NEVER, dtype=wide, device=q.device)
        for source, (keys, values) in _round(torch.stack([k, v]), ring):
            for block in mask.blocks(source):
                rows = block.queries
                mixed, block_lse = kernel.forward(
                    q[:, :, rows], keys[:, :, block.keys], values[:, :, block.keys], block
                )
                joint = torch.logaddexp(lse[:, :, rows], block_lse)
                old, new = (weights_of(x[..., None], joint) for x in (lse[:, :, rows], block_lse))
                out[:, :, rows] = out[:, :, rows] * old + mixed * new
                lse[:, :, rows] = joint
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.options = mask, kernel, ring
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, bias, out, lse = ctx.saved_tensors
        mask, kernel, ring = ctx.options
        d_q = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        d_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[3] else None
        before = None  # waits for gradients of the same keys, from the processes that had them before
        for source, (keys, values) in _round(torch.stack([k, v]), ring):
            d_kv = torch.zeros(2, *k.shape, dtype=lse.dtype, device=k.device)
            for block in mask.blocks(source):
                rows, columns = block.queries, block.keys
                here = q[:, :, rows], keys[:, :, columns], values[:, :, columns]
                found = kernel.backward(gradient[:, :, rows], *here, out[:, :, rows], lse[:, :, rows], block)
                d_q[:, :, rows] += found.queries
                d_kv[0][:, :, columns] += found.keys
                d_kv[1][:, :, columns] += found.values
                if d_bias is not None and found.scores is not None:
                    summed = found.scores.sum(0, keepdim=True) if d_bias.shape[0] == 1 else found.scores
                    d_bias[:, :, rows, mask.columns(block)] += summed
            if before is not None:
                d_kv += before()
            before = ring.shift(d_kv)
        assert before is not None
        d_k, d_v = before()
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), d_bias, None, None, None


def _round(held: Tensor, ring: PointToPoint) -> Iterator[tuple[int, Tensor]]:
    """(process, its tensor) for every process, this one first; the next is on its way while one is used."""
    for turn in range(ring.size - 1):
        following = ring.shift(held)
        yield (ring.rank - turn) % ring.size, held
        held = following()
    yield (ring.rank + 1) % ring.size, held
