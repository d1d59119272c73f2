"""Both matmuls around SwiGLU, the activation and its gradient computed where the matmuls end, before their results
reach memory: the package quack-kernels writes such matmuls for Hopper GPUs and later.

N rows, E inputs, I inner width, O outputs. Gates and ups lie in pairs: column 2i is gate i, column 2i + 1 is up i.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from inspect import signature

import torch
from torch import Tensor

from luban.kernels.available import unusable
from luban.kernels.limits import PAIRED_SIDES
from luban.kernels.tracing import constant_in_graphs

HALF = (torch.bfloat16, torch.float16)
_served: set[tuple[int, ...]] = set()  # sides met so far


@cache
def missing() -> str | None:
    """Why quack-kernels can't be used; None where it can."""
    return unusable("quack-kernels", "quack", _load, "SwiGLU")


def _load() -> None:
    """Import it; raise where its functions don't take what they are given below, as those of another version."""
    gemm = import_module("quack.gemm_interface")
    import_module("quack.epilogue.library")  # they import it when they are called
    options = {"activation": "swiglu", "config": _tiles(128, 128)}
    signature(gemm.gemm_gated).bind(*[None] * 2, **options)
    signature(gemm.gemm_dgated).bind(*[None] * 3, **options)


@constant_in_graphs
def picked(device: str, dtype: torch.dtype, weights: torch.dtype, *sides: int) -> bool:
    """`serves`, where the matmuls are about to run: `report` tells of it."""
    if serves(device, dtype, weights, *sides):
        _served.add(sides)
        return True
    return False


def clear() -> None:
    """Forget what ran, before another run."""
    _served.clear()


def serves(device: str, dtype: torch.dtype, weights: torch.dtype, *sides: int) -> bool:
    """True if the fused matmuls support these shapes here, for any number of rows.

    Args:
        device: "cpu", "cuda". dtype: of the rows. weights: their dtype.
        sides: of both weights: inputs, inner width, outputs.
    """
    fits = dtype == weights and dtype in HALF and not any(side % PAIRED_SIDES for side in sides)
    return (
        fits
        and device == "cuda"
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability()[0] == 9
        and missing() is None
    )


def report() -> list[str]:
    """A line where SwiGLU was computed in such matmuls, for logs."""
    return ["feed-forward: SwiGLU inside its matmuls (quack-kernels)"] if _served else []


def _tiles(rows: int, cols: int):
    from quack.gemm_config import GemmConfig  # pyright: ignore[reportMissingImports]

    return GemmConfig(tile_m=rows, tile_n=cols, pingpong=True, cluster_m=1, cluster_n=2, is_dynamic_persistent=False)


@torch.library.custom_op("luban::gated_matmuls", mutates_args=())
def gated_matmuls(x: Tensor, weight: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, E), paired weight (2I, E) and down (O, I) → ((silu(gate) · up)·downᵀ (N, O), gates and ups x·weightᵀ (N, 2I)).

    Gradients flow through the first; they need no more than the arguments and the second, since the inner activation
    comes again with its gradient. Being one operator, it is recomputed or kept as a whole.
    """
    from quack.gemm_interface import gemm_gated  # pyright: ignore[reportMissingImports]

    gate_up, inner = gemm_gated(x.contiguous(), weight.t(), activation="swiglu", config=_tiles(192, 128))
    return inner @ down.t(), gate_up


@torch.library.custom_op("luban::gated_matmuls_backward", mutates_args=())
def gated_matmuls_backward(dy: Tensor, down: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """dy (N, O), down (O, I) and gate_up (N, 2I) → (gradient of gate_up, silu(gate) · up (N, I) again)."""
    from quack.gemm_interface import gemm_dgated  # pyright: ignore[reportMissingImports]

    return gemm_dgated(dy.contiguous(), down, gate_up, activation="swiglu", config=_tiles(128, 128))


@gated_matmuls.register_fake
def _(x, weight, down):
    return x.new_empty(x.shape[0], down.shape[0]), x.new_empty(x.shape[0], weight.shape[0])


@gated_matmuls_backward.register_fake
def _(dy, down, gate_up):
    return torch.empty_like(gate_up), gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # a gradient of zeros for gates and ups would be as large as these
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, dy, _):
    x, weight, down, gate_up = ctx.saved_tensors
    if dy is None:
        return None, None, None
    of_x, of_weight, of_down = ctx.needs_input_grad
    d_gate_up, inner = gated_matmuls_backward(dy, down, gate_up)
    return (
        d_gate_up @ weight if of_x else None,
        d_gate_up.t() @ x if of_weight else None,
        dy.t() @ inner if of_down else None,
    )


gated_matmuls.register_autograd(_differentiate, setup_context=_save)


def paired(gate: Tensor, up: Tensor) -> Tensor:
    """(I, E) twice → (2I, E), rows in turns."""
    return torch.stack([gate, up], 1).flatten(0, 1)
