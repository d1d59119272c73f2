"""Clipping by the global norm (Pascanu et al. 2013, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients taken as one vector, an fp32 scalar (fp64 for fp64 gradients); infinite or NaN if any value is."""
    double = any(gradient.dtype == torch.float64 for gradient in gradients)
    norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float64 if double else torch.float32)
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def clip_factor(norm: Tensor, max_norm: float, divide_by: float = 1.0) -> Tensor:
    """The factor that divides gradients of global norm `norm` by `divide_by` (a loss scale) and bounds their norm.

    Args:
        norm: the global norm before either, a scalar.
        max_norm: bound on the norm after the division; 0: none.
    """
    factor = torch.full_like(norm, 1 / divide_by)
    return torch.minimum(factor, max_norm / norm) if max_norm > 0 else factor
