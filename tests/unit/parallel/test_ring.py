"""Ring attention over processes, by kernels and written out, beside attention over whole rows in one."""

from __future__ import annotations

import os
import random
import socket

import pytest
import torch
import torch.distributed as dist
import warm

from luban.kernels.attention_mask import AttentionMask
from luban.parallel.context import slots_of
from luban.parallel.ring import ring_attention
from luban.parallel.ring_blocks import Flash, RingMask
from tests.interpreter import HERE, here, run_interpreted

B, H, K, D, TOKENS = 2, 2, 1, 16, 48
MASKS = ("causal", "all", "documents", "window", "padding")


def whole_mask(kind: str, seed: int) -> AttentionMask:
    """A random mask of the kind, of rows of TOKENS."""
    draw = torch.Generator().manual_seed(seed)
    common = {"queries": TOKENS, "keys": TOKENS, "device": torch.device("cpu")}
    if kind == "documents":
        opens = torch.rand(B, TOKENS, generator=draw) < 0.1
        return AttentionMask(causal=True, documents=opens.cumsum(1), **common)
    if kind == "window":
        return AttentionMask(causal=True, window=int(torch.randint(3, 40, (), generator=draw)), **common)
    if kind == "padding":
        lengths = torch.randint(5, TOKENS + 1, (B, 1), generator=draw)
        return AttentionMask(causal=True, token_mask=torch.arange(TOKENS) < lengths, **common)
    return AttentionMask(causal=kind == "causal", **common)


def worst_error(rank: int, ranks: int, kind: str, seed: int, flash: bool) -> float:
    """Of this process's output and gradients, relative to attention over whole rows in fp64."""
    torch.manual_seed(seed)
    q, k, v, d_out = (torch.randn(B, h, TOKENS, D) for h in (H, K, K, H))
    mask, slots = whole_mask(kind, seed), [slots_of(r, ranks, TOKENS) for r in range(ranks)]
    at = torch.arange(TOKENS)
    seen = mask.between(at, at)
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(H // K, 1) for x in wide[1:])
    raw = (wide[0] @ keys.mT / D**0.5).masked_fill(~seen, float("-inf"))
    want = raw.softmax(-1) @ values
    real = torch.ones(B, TOKENS, dtype=torch.bool) if mask.token_mask is None else mask.token_mask
    d_out = d_out * real[:, None, :, None]  # what padding attends to is nobody's business
    want.backward(d_out.double())
    mine = slots[rank]
    dtype = torch.float32 if flash else torch.float64
    parts = [x[:, :, mine].to(dtype).requires_grad_() for x in (q, k, v)]
    ring_mask = RingMask(mask, slots, rank, None)
    assert Flash.serves(parts[0], ring_mask) == flash
    got = ring_attention(*parts, ring_mask, D**-0.5, dist.group.WORLD)
    got.backward(d_out[:, :, mine].to(dtype))
    errors = [((got.double() - want[:, :, mine]) * real[:, None, mine, None]).abs().max()]
    for part, whole in zip(parts, wide, strict=True):
        assert part.grad is not None and whole.grad is not None
        errors.append((part.grad.double() - whole.grad[:, :, mine]).abs().max())
    return max(float(e) for e in errors)


def work(rank: int, ranks: int, port: int, cases: list[tuple[str, int]], flash: bool) -> None:
    """One process: every case within rounding."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    try:
        for kind, seed in cases:
            error = worst_error(rank, ranks, kind, seed, flash)
            assert error < (2e-5 if flash else 1e-12), (kind, seed, error)
    finally:
        dist.destroy_process_group()


def run(ranks: int, cases: list[tuple[str, int]], *, flash: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    warm.processes(work, ranks, ranks, port, cases, flash)


@here
def test_by_kernels():
    """Also under the interpreter; messages go over Gloo."""
    seed = random.randrange(2**31)
    run(2, [(kind, seed) for kind in ("causal", "documents", random.choice(("all", "window", "padding")))], flash=True)


def test_written_out():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the kernels' turn")
    seed = random.randrange(2**31)
    run(3, [(kind, seed + i) for i, kind in enumerate(MASKS)], flash=False)


@pytest.mark.skipif(HERE, reason="test_by_kernels runs here")
def test_under_the_interpreter():
    run_interpreted(__file__)
