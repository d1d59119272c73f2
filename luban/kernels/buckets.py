"""Attention within buckets of tokens, in time linear in the row (Kitaev et al. 2020, section 2).

Tokens are sorted by bucket and cut into chunks, and each chunk attends to itself and the chunk before. The paper lets a token see
what happens to be in those two chunks, which depends on how many later tokens fall into earlier buckets. Here a token sees the
`span` tokens of its bucket before it, which are always in those chunks: no later token changes what it sees, so that generation
token by token is the same computation.

B batch, H heads, R rounds, T queries, S keys, D head dim, M chunks of C queries, W keys that a chunk sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SELF = -1e5  # added to a token's score with itself where keys are queries: it counts only where there is no other


def bucket_attention(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    buckets_BHRT: Tensor,
    *,
    span: int,
    causal: bool = True,
    scale: float = 1.0,
    shared: bool = True,
) -> Tensor:
    """softmax over the keys that a query sees in any round, (B, H, T, D). A key found in several rounds counts once.

    Args:
        buckets_BHRT: int; tokens of different documents are in different ones, padding is in none of theirs.
        span: a query sees so many tokens of its bucket before it (if not causal, also after it), and itself.
        scale: of the scores.
        shared: queries and keys are one vector, so that a token's score with itself would outweigh all others.
    """
    R, T = buckets_BHRT.shape[2:]
    order_BHRT = sorted_order(buckets_BHRT)
    slot_BHRT = order_BHRT.argsort(-1)  # where each token stands in the sorted order of each round
    chunks = -(-T // span)
    padded = chunks * span - T
    token_BHRMC = F.pad(order_BHRT, (0, padded), value=-1).unflatten(-1, (chunks, span))
    key_BHRMW = _with_neighbours(token_BHRMC[..., None], -1, causal).squeeze(-1)

    def rows(x_BHTD: Tensor) -> Tensor:
        """(B, H, R, M, C, D): the sorted tokens of every round, by chunks of C = span."""
        index = order_BHRT[..., None].expand(-1, -1, -1, -1, x_BHTD.shape[-1])
        found = x_BHTD[:, :, None].expand(-1, -1, R, -1, -1).gather(3, index)
        return F.pad(found, (0, 0, 0, padded)).unflatten(3, (chunks, span))

    seen = [_sees(token_BHRMC, key_BHRMW, buckets_BHRT[:, :, r], slot_BHRT[:, :, r], span, causal) for r in range(R)]
    here_BHRMCW = torch.stack([each[:, :, r] for r, each in enumerate(seen)], 2) | (token_BHRMC < 0)[..., None]
    k_BHRMWD, v_BHRMWD = (_with_neighbours(rows(x), 0, causal) for x in (k_BHTD, v_BHTD))
    scores = (rows(q_BHTD) @ k_BHRMWD.mT).to(_wide(q_BHTD)) * scale
    if R > 1:  # a key that is seen in several rounds counts once
        scores = scores - torch.stack(seen).sum(0, dtype=scores.dtype).clamp_min(1).log()
    if shared:
        scores = scores + SELF * (token_BHRMC[..., :, None] == key_BHRMW[..., None, :])
    scores = scores.masked_fill(~here_BHRMCW, float("-inf"))
    total_BHRMC = scores.logsumexp(-1)
    weights = (scores - total_BHRMC[..., None]).exp().to(v_BHTD.dtype)
    mixed_BHRSD = (weights @ v_BHRMWD).flatten(3, 4)
    back = slot_BHRT[..., None].expand(-1, -1, -1, -1, v_BHTD.shape[-1])
    share_BHRT = total_BHRMC.flatten(3, 4).gather(3, slot_BHRT).softmax(2)
    return (mixed_BHRSD.gather(3, back) * share_BHRT[..., None].to(v_BHTD.dtype)).sum(2)


def bucket_attention_dense(
    q_BHTD: Tensor,
    k_BHSD: Tensor,
    v_BHSD: Tensor,
    buckets_BHRS: Tensor,
    *,
    span: int,
    causal: bool = True,
    scale: float = 1.0,
    shared: bool = True,
) -> Tensor:
    """The same for the last T of S tokens with the T × S scores written out: for few new tokens behind a cache, and as the
    reference."""
    T, S = q_BHTD.shape[2], k_BHSD.shape[2]
    slot_BHRS = sorted_order(buckets_BHRS).argsort(-1)
    distance = slot_BHRS[..., S - T :, None] - slot_BHRS[..., None, :]
    near = (distance >= 0) & (distance <= span) if causal else distance.abs() <= span
    seen_BHTS = (near & (buckets_BHRS[..., S - T :, None] == buckets_BHRS[..., None, :])).any(2)
    scores = (q_BHTD @ k_BHSD.mT).to(_wide(q_BHTD)) * scale
    if shared:
        itself = torch.arange(S - T, S, device=scores.device)[:, None] == torch.arange(S, device=scores.device)
        scores = scores + SELF * itself
    return scores.masked_fill(~seen_BHTS, float("-inf")).softmax(-1).to(v_BHSD.dtype) @ v_BHSD


def sorted_order(buckets_BHRT: Tensor) -> Tensor:
    """(B, H, R, T): tokens by bucket, those of one bucket in the row's order."""
    tokens = buckets_BHRT.shape[-1]
    return (buckets_BHRT * tokens + torch.arange(tokens, device=buckets_BHRT.device)).argsort(-1)


def chunk_flops(
    batch: int, heads: int, rounds: int, tokens: int, span: int, head_dim: int, *, causal: bool = True
) -> int:
    """FLOPs of `bucket_attention`: scores and mixing of every chunk with the two (if not causal, three) that it sees."""
    slots, keys = -(-tokens // span) * span, (2 if causal else 3) * span
    return 4 * batch * heads * rounds * slots * keys * head_dim


def chunk_saved(
    batch: int, heads: int, rounds: int, tokens: int, span: int, head_dim: int, *, causal: bool = True
) -> int:
    """Elements that `bucket_attention` saves for its backward pass beside its inputs: sorted queries, the keys and values that
    each chunk sees, scores and weights, what every round found, and its share."""
    chunks = -(-tokens // span)
    keys = (2 if causal else 3) * span
    slots, found = batch * heads * rounds * chunks * span, batch * heads * rounds * tokens
    return slots * (2 * head_dim + 2 * keys + 1) + 2 * slots * keys // span * head_dim + found * (head_dim + 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _with_neighbours(x_BHRMCD: Tensor, fill: int, causal: bool) -> Tensor:
    """(B, H, R, M, W, D): every chunk with the one before it and, if not causal, the one behind it."""
    before = F.pad(x_BHRMCD, (0, 0, 0, 0, 1, 0), value=fill)[:, :, :, :-1]
    if causal:
        return torch.cat((before, x_BHRMCD), 4)
    return torch.cat((before, x_BHRMCD, F.pad(x_BHRMCD, (0, 0, 0, 0, 0, 1), value=fill)[:, :, :, 1:]), 4)


def _sees(
    token_BHRMC: Tensor, key_BHRMW: Tensor, bucket_BHT: Tensor, slot_BHT: Tensor, span: int, causal: bool
) -> Tensor:
    """(B, H, R, M, C, W) bool: whether a query sees a key in one round, that of the given buckets and sorted order."""

    def of(x_BHT: Tensor, index: Tensor) -> Tensor:
        return x_BHT.gather(2, index.clamp_min(0).flatten(2)).view(index.shape)

    same = of(bucket_BHT, token_BHRMC)[..., :, None] == of(bucket_BHT, key_BHRMW)[..., None, :]
    distance = of(slot_BHT, token_BHRMC)[..., :, None] - of(slot_BHT, key_BHRMW)[..., None, :]
    near = (distance >= 0) & (distance <= span) if causal else distance.abs() <= span
    return same & near & (key_BHRMW >= 0)[..., None, :]
