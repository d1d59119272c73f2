"""Reference cross-entropy of a linear layer's outputs, by its definition. N rows, E width, V vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy(
    rows_NE: Tensor,
    table_VE: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum over rows of −Σ_v y_v·log p_v + z_loss·log²Z, () in nats, where y is the smoothed target.

    Args:
        rows_NE: (N, E). table_VE: (V, E), the lm_head weight. bias_V: (V,).
        targets_N: (N,) int64; rows with -100 are ignored.
        smoothing: label smoothing. z_loss: factor on log²Z.
    """
    logits_NV = rows_NE @ table_VE.t() + (0 if bias_V is None else bias_V)
    log_z = logits_NV.logsumexp(-1)
    counted = targets_N != -100
    wanted = torch.nn.functional.one_hot(targets_N.clamp_min(0), logits_NV.shape[1]).to(logits_NV)
    wanted = (1 - smoothing) * wanted + smoothing / logits_NV.shape[1]
    each = log_z * wanted.sum(-1) - (wanted * logits_NV).sum(-1) + z_loss * log_z.square()
    return each[counted].sum()
