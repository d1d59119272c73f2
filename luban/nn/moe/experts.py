"""The experts' weights and matmuls.

M rows sorted by expert, X experts (in this process), E model width, I inner width of an expert, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from luban.core.plan import even_runs
from luban.nn.feedforward.base import Activation
from luban.nn.linear import Projection

ALIGNED = 16  # bytes that the rows of matrices of a grouped matmul are a multiple of


class ExpertProjection(Projection):
    """Weights (X, O, I) of one linear map of every expert."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, writes_residual: bool = False):
        super().__init__(inputs, outputs, bias=False, role="expert", writes_residual=writes_residual)
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))


class Experts(nn.Module):
    """The feed-forward networks of all experts: down(activation(gate(x)) · up(x)), or down(activation(up(x))) without a gate.

    Weights are cast to the inputs' dtype, since those that plan.expert or plan.shard keep apart stay in float32.
    """

    def __init__(self, experts: int, width: int, inner: int, activation: Activation, *, gated: bool):
        super().__init__()
        self.activation = activation
        self.gate = ExpertProjection(experts, width, inner) if gated else None
        self.up = ExpertProjection(experts, width, inner)
        self.down = ExpertProjection(experts, inner, width, writes_residual=True)

    def forward(self, rows_ME: Tensor, counts_X: Tensor) -> Tensor:
        """(M, E) → (M, E).

        Args:
            rows_ME: those of the first expert first.
            counts_X: int64, rows of each expert; they sum to M.
        """
        ends_X = counts_X.cumsum(0).to(torch.int32)
        up_MI = grouped_matmul(rows_ME, self.up.weight.to(rows_ME.dtype), ends_X)
        if self.gate is None:
            inner_MI = self.activation(up_MI)
        else:
            inner_MI = self.activation(grouped_matmul(rows_ME, self.gate.weight.to(rows_ME.dtype), ends_X)) * up_MI
        return grouped_matmul(inner_MI, self.down.weight.to(rows_ME.dtype), ends_X)


def grouped_matmul(rows_MI: Tensor, weights_XOI: Tensor, ends_X: Tensor) -> Tensor:
    """(M, I) · weightsᵀ → (M, O), each run of rows with the weight of its expert: torch's grouped matmul where it serves.

    Args:
        ends_X: int32, the row at which each expert's rows end.
    """
    if rows_MI.shape[0] and serves_grouped(rows_MI, weights_XOI):
        return _Contiguous.apply(F.grouped_mm(rows_MI, weights_XOI.transpose(-2, -1), offs=ends_X))
    return grouped_matmul_reference(rows_MI, weights_XOI, ends_X)


def grouped_matmul_reference(rows_MI: Tensor, weights_XOI: Tensor, ends_X: Tensor) -> Tensor:
    """The same, one matmul an expert; for any dtype and width. Tensors without data, of memory predictions, are read as if all
    experts had equally many rows."""
    if without_data(rows_MI):
        ends = [end for _, end in even_runs(rows_MI.shape[0], len(weights_XOI))]
    else:
        ends = ends_X.tolist()
    parts = [
        F.linear(rows_MI[begin:end], weight)
        for begin, end, weight in zip([0, *ends], ends, weights_XOI.unbind(), strict=False)
    ]
    return torch.cat(parts)


def serves_grouped(rows_MI: Tensor, weights_XOI: Tensor) -> bool:
    """Whether torch's grouped matmul supports dtype and widths."""
    if without_data(rows_MI):
        return False
    aligned = all(size * rows_MI.dtype.itemsize % ALIGNED == 0 for size in weights_XOI.shape[1:])
    return aligned and rows_MI.dtype in (torch.float32, torch.bfloat16, torch.float16)


def without_data(x: Tensor) -> bool:
    """Whether a tensor has a shape alone."""
    return x.is_meta or is_fake(x)


class _Contiguous(torch.autograd.Function):
    """Its input; the gradient is made contiguous, which torch's grouped matmul requires."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.contiguous()
