"""Matmuls and element-wise functions whose result for a row doesn't depend on the other rows or on how many there are, bit
for bit.

BLAS libraries choose another order of summation for another number of rows. Here every matmul has the same shape: tiles
of `ROWS` rows, filled up with zeros; on a GPU a kernel whose tiles and order of summation are fixed. (He et al. 2025,
"Defeating Nondeterminism in LLM Inference", names the cause and this remedy.)

N rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from luban.core.errors import UnsupportedError
from luban.nn.linear import Matmul, matmul_owners

ROWS = 16  # of a tile; more waste more work on few rows, fewer read the weights more often for many rows


class InvariantMatmul(Matmul):
    """One row at a time, as far as its result tells."""

    def linear(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        """x·weightᵀ (+ bias), (…, I) → (…, O)."""
        rows_NI = x.reshape(-1, x.shape[-1])
        if len(rows_NI) == 0:
            return x.new_empty(*x.shape[:-1], weight_OI.shape[0])
        if rows_NI.is_cuda:
            from luban.kernels.fixed_matmul import fixed_matmul

            out_NO = fixed_matmul(rows_NI, weight_OI, bias_O)
        else:
            padded = F.pad(rows_NI, (0, 0, 0, -len(rows_NI) % ROWS))
            out_NO = torch.cat([F.linear(tile, weight_OI, bias_O) for tile in padded.split(ROWS)])[: len(rows_NI)]
        return out_NO.view(*x.shape[:-1], -1)


def use_invariant_matmuls(module: nn.Module) -> None:
    """Let every owner of matmul weights in a module multiply so. UnsupportedError for weights in 8 bits."""
    for name, owner in matmul_owners(module):
        if owner.packed is not None:
            raise UnsupportedError(
                f"batch-invariant outputs need weights in float32, bfloat16 or float16: those of {name} are packed in fewer bits"
            )
        owner.use_matmul(InvariantMatmul())


LANES = 64  # numbers: a multiple of every vector register's, so that no element is left to the scalar code …
SERIAL = 16_384  # … and of one call at most, which torch doesn't divide among threads
ROUNDED = {  # functions of one tensor whose vector and scalar code round differently
    getattr(owner, name)
    for owner in (torch, Tensor, F)
    for name in ("silu", "gelu", "softplus", "mish", "exp", "log", "log1p", "sigmoid", "tanh", "cos", "sin", "erf")
    if hasattr(owner, name)
}


class InvariantElements(TorchFunctionMode):
    """Inside it, element-wise functions on a CPU give each element what they give it anywhere: always their vector code,
    which torch leaves at the end of a tensor, or of a thread's part of it, for scalar code that rounds differently."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `function`, one of `ROUNDED` on padded pieces of its argument."""
        kwargs = kwargs or {}
        if function not in ROUNDED or not args or type(args[0]) is not Tensor or args[0].is_cuda or "out" in kwargs:
            return function(*args, **kwargs)
        x, rest = args[0], args[1:]
        flat = F.pad(x.reshape(-1), (0, -x.numel() % LANES))
        return torch.cat([function(piece, *rest, **kwargs) for piece in flat.split(SERIAL)])[: x.numel()].view(x.shape)
