"""Intervals of keys and the order of work, against brute force on fresh random documents."""

from __future__ import annotations

import random

import torch

from luban.kernels.intervals import intervals, seeing_rows, work_items


def test_intervals_against_brute_force():
    for _ in range(20):
        T = random.randint(1, 40)
        docs = torch.sort(torch.randint(0, 4, (2, T)), 1).values
        window, causal = random.choice([None, random.randint(1, 10)]), random.random() < 0.5
        mask = intervals(T, T, causal=causal, window=window, documents=docs)
        i, j = torch.arange(T)[:, None], torch.arange(T)[None]
        want = (docs[:, :, None] == docs[:, None, :]) & ((j <= i) | (not causal))
        want &= ((i - j).abs() < window) if window else True
        assert torch.equal(mask.dense(T)[:, 0], want) and mask.pairs() == int(want.sum())
        first, past = seeing_rows(mask, T).unbind(1)
        assert torch.equal((i >= first[:, None, :]) & (i < past[:, None, :]), want)


def test_the_order_of_work_lists_every_block_once_long_documents_first():
    for _ in range(20):
        T, side, B = random.randint(1, 90), random.choice([4, 16]), random.randint(1, 3)
        docs = torch.sort(torch.randint(0, 5, (B, T)), 1).values
        mask = intervals(T, T, causal=random.random() < 0.5, documents=docs)
        seeing = seeing_rows(mask, T)
        lengths = (docs[:, :, None] == docs[:, None, :]).sum(2)
        for items, begin, end in zip(
            work_items(mask, seeing, side), (mask.start, seeing[:, 0]), (mask.stop, seeing[:, 1]), strict=True
        ):
            blocks = [(row, block) for row, block, *_ in items.tolist()]
            assert sorted(blocks) == [(row, block) for row in range(B) for block in range(-(-T // side))]
            for row, block, *bounds in items.tolist():
                top, bottom = block * side, min(block * side + side, T) - 1
                assert bounds == [x[row, at].item() for x in (begin, end) for at in (top, bottom)]
            order = [lengths[row, block * side].item() for row, block in blocks]
            assert order == sorted(order, reverse=True)
    alone = intervals(64, 64, token_mask=torch.ones(1, 64, dtype=torch.bool))  # one document: the longest walk first
    for items in work_items(alone, seeing_rows(alone, 64), 16):
        walks = [end - begin for _, _, begin, _, _, end in items.tolist()]
        assert walks == sorted(walks, reverse=True)
