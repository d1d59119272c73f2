"""Attention within clusters that take the tokens nearest to them (Roy et al. 2021, section 4.1).

B batch, H heads, T tokens, D head dim, C clusters, W tokens of a cluster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luban.kernels.buckets import SELF


def cluster_attention(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    likeness_BHTC: Tensor,
    documents_BT: Tensor | None = None,
    *,
    size: int,
    causal: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """(B, H, T, D): the mean of what a token's clusters give it; 0 for a token in none.

    Queries and keys are one vector: a token counts itself only where it sees no other of its cluster.

    Args:
        likeness_BHTC: how near each token is to each centroid; −∞ for padding.
        documents_BT: (B, T) int; a token sees those of its document alone. None: one document a row.
        size: W, the tokens that a cluster takes: those with the largest likeness.
    """
    heads, tokens, width = q_BHTD.shape[1:]
    # stable, so that of tokens that are equally near the earlier ones are taken, wherever padding lies
    order_BHCT = torch.argsort(likeness_BHTC.mT, dim=-1, descending=True, stable=True)
    taken_BHCW = order_BHCT[..., : min(size, tokens)].sort(-1).values
    real_BHCW = likeness_BHTC.mT.gather(-1, taken_BHCW) > float("-inf")
    index_BHPD = taken_BHCW.flatten(2)[..., None].expand(-1, -1, -1, width)
    q, k, v = (x.gather(2, index_BHPD).unflatten(2, taken_BHCW.shape[2:]) for x in (q_BHTD, k_BHTD, v_BHTD))
    itself = torch.eye(taken_BHCW.shape[-1], dtype=torch.bool, device=q.device)
    visible = real_BHCW[..., None, :].expand(*real_BHCW.shape, -1)
    if causal:
        visible = visible & itself.new_ones(itself.shape).tril()
    if documents_BT is not None:
        at = documents_BT[:, None].expand(-1, heads, -1).gather(2, taken_BHCW.flatten(2)).view(taken_BHCW.shape)
        visible = visible & (at[..., :, None] == at[..., None, :])
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * scale + SELF * itself
    weights = scores.masked_fill(~(visible | itself), float("-inf")).softmax(-1).to(v.dtype)
    mixed_BHPD = ((weights @ v) * real_BHCW[..., None]).flatten(2, 3)
    total = torch.zeros_like(v_BHTD).scatter_add(2, index_BHPD, mixed_BHPD)
    times = torch.zeros_like(v_BHTD[..., 0]).scatter_add(2, taken_BHCW.flatten(2), real_BHCW.flatten(2).to(v.dtype))
    return total / times.clamp_min(1)[..., None]
