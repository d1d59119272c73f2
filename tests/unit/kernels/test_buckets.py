"""Attention in sorted buckets and in clusters against loops over queries and keys, and dense attention where all are one."""

from __future__ import annotations

import random

import pytest
import torch

from luban.kernels.buckets import bucket_attention, bucket_attention_dense
from luban.kernels.clusters import cluster_attention


def draw(tokens, *, batch=2, heads=2, width=5):
    return [torch.randn(batch, heads, tokens, width, dtype=torch.float64) for _ in range(3)]


def attended(q, k, v, seen, scale):
    """One query over the keys that it sees; itself only where it sees no other."""
    at, keys = seen
    others = [j for j in keys if j != at] or keys
    scores = torch.stack([q[at] @ k[j] for j in others]) * scale
    return scores.softmax(0) @ torch.stack([v[j] for j in others])


def by_loops(q, k, v, buckets, span, causal, scale):
    out = torch.zeros_like(v)
    B, H, R, T = buckets.shape
    for b, h, i in ((b, h, i) for b in range(B) for h in range(H) for i in range(T)):
        seen = set()
        for r in range(R):
            mine = [j for j in range(T) if buckets[b, h, r, j] == buckets[b, h, r, i]]
            at = mine.index(i)
            seen |= set(mine[max(0, at - span) : at + 1 if causal else at + span + 1])
        out[b, h, i] = attended(q[b, h], k[b, h], v[b, h], (i, sorted(seen)), scale)
    return out


@pytest.mark.parametrize("causal", [True, False])
def test_sorted_chunks_and_written_out_scores_are_the_loops(causal):
    T, R, span = random.randint(1, 30), random.randint(1, 4), random.randint(1, 12)
    q, k, v = draw(T)
    buckets = torch.randint(-1, random.randint(0, 4), (2, 2, R, T))
    wanted = by_loops(q, k, v, buckets, span, causal, 0.7)
    options = {"span": span, "causal": causal, "scale": 0.7}
    torch.testing.assert_close(bucket_attention(q, k, v, buckets, **options), wanted, atol=1e-10, rtol=0)
    torch.testing.assert_close(bucket_attention_dense(q, k, v, buckets, **options), wanted, atol=1e-10, rtol=0)
    last = random.randint(1, T)
    some = bucket_attention_dense(q[:, :, -last:], k, v, buckets, **options)
    torch.testing.assert_close(some, wanted[:, :, -last:], atol=1e-10, rtol=0)


@pytest.mark.parametrize("rounds", [1, 3])
def test_one_bucket_is_exact_attention(rounds):
    T = random.randint(2, 40)
    q, k, v = draw(T)
    scores = (q @ k.mT).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(), float("-inf"))
    scores[:, :, 0, 0] = 0  # the first token has no other
    wanted = scores.softmax(-1) @ v
    for method in (bucket_attention, bucket_attention_dense):
        found = method(q, k, v, torch.zeros(2, 2, rounds, T, dtype=torch.long), span=T)
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=0)


def test_gradients_of_sorted_chunks_are_those_of_written_out_scores():
    T = random.randint(5, 25)
    inputs = [x.requires_grad_() for x in draw(T)]
    buckets, dy = torch.randint(0, 3, (2, 2, 2, T)), torch.randn(2, 2, T, 5, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(method(*inputs, buckets, span=4), inputs, dy)
        for method in (bucket_attention, bucket_attention_dense)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_clusters_take_the_nearest_tokens_and_give_their_mean(causal):
    T, C, size = random.randint(2, 25), random.randint(1, 4), random.randint(1, 9)
    q, k, v = draw(T)
    likeness = torch.randn(2, 2, T, C, dtype=torch.float64)
    documents = torch.sort(torch.randint(0, 3, (2, T)), 1).values
    likeness[1, :, -1] = float("-inf")  # padding
    found = cluster_attention(q, k, v, likeness, documents, size=size, causal=causal, scale=0.7)
    for b, h, i in ((b, h, i) for b in range(2) for h in range(2) for i in range(T)):
        given = []
        for c in range(C):
            order = sorted(range(T), key=lambda j, of=likeness[b, h, :, c]: -of[j].item())[:size]
            taken = sorted(j for j in order if likeness[b, h, j, c] > float("-inf"))
            if i in taken:
                keys = [j for j in taken if (j <= i or not causal) and documents[b, i] == documents[b, j]]
                given.append(attended(q[b, h], k[b, h], v[b, h], (i, keys), 0.7))
        wanted = torch.stack(given).mean(0) if given else torch.zeros(5, dtype=torch.float64)
        torch.testing.assert_close(found[b, h, i], wanted, atol=1e-10, rtol=0)
