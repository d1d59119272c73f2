"""Clipping by the global norm (Pascanu et al. 2013, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients taken as one vector, as a scalar; infinite or NaN if any value is."""
    return torch.nn.utils.get_total_norm(gradients, norm_type=2.0)


@torch.no_grad()
def scale_(gradients: Sequence[Tensor], norm: float, max_norm: float, divide_by: float = 1.0) -> float:
    """Divide the gradients by `divide_by` (a loss scale), then bound their norm by `max_norm` (0: unbounded).

    Args:
        norm: the global norm before either.

    Returns:
        The norm after the division and before clipping: what is logged.
    """
    true_norm = norm / divide_by
    factor = 1 / divide_by
    if max_norm > 0 and true_norm > max_norm:
        factor *= max_norm / true_norm
    if factor != 1:
        torch._foreach_mul_(list(gradients), factor)
    return true_norm
