"""Measures how fast a device is by the size of the work, as a table for `luban plan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from luban.parallel.device import timed
from luban.planner.accelerators import accelerator

ROUNDS = 5  # of every measurement, of which the median counts
SQUARES = (128, 256, 512, 1024, 2048, 4096, 8192)  # m = n = k
THIN = (16, 32, 64, 128, 256, 512)  # least of m, n and k, the others LARGE
LARGE = 4096
HEAD_DIMS = (64, 128)
COPY_BYTES = 2**28
CALLS = 200  # of the smallest kernel, timed together


def measure_machine(gpu: str, device: torch.device, dtype: torch.dtype, *, largest: int = 8192) -> dict[str, Any]:
    """The fields of a `MachineTable`.

    Args:
        gpu: row of accelerators.toml, whose bf16 peak shares refer to.
        largest: side of a matmul; smaller where a device would take too long.
    """
    peak = accelerator(gpu).peak_flops("bf16")
    squares = [n for n in SQUARES if n <= largest]
    shares = [(float(n), matmul_rate(n, n, n, device, dtype) / peak) for n in squares]
    whole = min(LARGE, largest)
    full = shares[-1][1]
    thin = [(float(n), min(matmul_rate(whole, whole, n, device, dtype) / peak / full, 1.0)) for n in THIN if n < whole]
    forward, backward = attention_rates(device, dtype, largest)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "gpu": gpu,
        "source": f"luban bench machine on {name}, torch {torch.__version__}",
        "matmul": _rising(shares),
        "thin": [*_rising(thin), (float(whole), 1.0)],
        "attention_forward": forward,
        "attention_backward": backward,
        "copy": copy_rate(device, largest) / 1e12,
        "launch_us": 1e6 * launch_seconds(device),
        "error": 0.1,
    }


def matmul_rate(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of (m × k) by (k × n)."""
    a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    return 2 * m * n * k / seconds_of(lambda: torch.mm(a, b), device)


def attention_rates(
    device: torch.device, dtype: torch.dtype, largest: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """TFLOP/s of causal attention forward and backward by head dim, what the mask leaves counted."""
    tokens, forward, backward = min(4096, largest), [], []
    for dim in HEAD_DIMS:
        shape = (1, max(largest // 8 // dim, 1), tokens, dim)
        q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
        flops = 2 * shape[1] * tokens**2 * dim

        def attend(q=q, k=k, v=v) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        mixed = attend()
        ones = torch.ones_like(mixed)

        def back(mixed=mixed, ones=ones, inputs=(q, k, v)) -> object:
            return torch.autograd.grad(mixed, inputs, ones, retain_graph=True)

        forward.append((float(dim), flops / seconds_of(attend, device) / 1e12))
        backward.append((float(dim), 2.5 * flops / seconds_of(back, device) / 1e12))
    return forward, backward


def copy_rate(device: torch.device, largest: int) -> float:
    """Bytes a second that a copy reads and writes."""
    size = COPY_BYTES if largest >= 4096 else COPY_BYTES // 16
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), device)


def launch_seconds(device: torch.device) -> float:
    """Seconds a kernel that does nothing takes, of many in a row."""
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(CALLS):
            x.add_(1)

    return seconds_of(many, device) / CALLS


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds after one run to warm up."""
    return sorted(timed(work, device, ROUNDS))[ROUNDS // 2]


def _rising(rows: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The table with values that don't fall by noise as sizes grow."""
    found: list[tuple[float, float]] = []
    for size, value in rows:
        found.append((size, max(value, found[-1][1] if found else 0.0)))
    return found
