"""Losses of reward models, pure functions of scores.

B groups, K answers of the largest group.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Margins by grade, from "significantly better" to "negligibly better" (Touvron et al. 2023b, table 27)
MARGINS = {"none": (0.0, 0.0, 0.0, 0.0), "small": (1.0, 2 / 3, 1 / 3, 0.0), "large": (3.0, 2.0, 1.0, 0.0)}
Margin = Literal["none", "small", "large"]


def margins_of(grades_B: Tensor, margin: Margin) -> Tensor:
    """(B,) margin of each group by its grade (B,), 0 where it has none (-1). The table's numbers are arguments of operations, so
    that none is copied to the device."""
    margins_B = torch.zeros(grades_B.shape, device=grades_B.device)
    for grade, value in enumerate(MARGINS[margin]):
        if value:
            margins_B = margins_B.masked_fill(grades_B == grade, value)
    return margins_B


def pairs(ranks_BK: Tensor, present_BK: Tensor) -> Tensor:
    """(B, K, K) bool: [b, i, j] is true where answer i is present and ranked above the present answer j."""
    better = ranks_BK[:, :, None] > ranks_BK[:, None, :]
    return better & present_BK[:, :, None] & present_BK[:, None, :]


def ranking_loss(
    scores_BK: Tensor, ranks_BK: Tensor, present_BK: Tensor, margins_B: Tensor, probabilities_B: Tensor
) -> Tensor:
    """(B,) loss of each group: the mean over its pairs of −[p log σ(Δr − m) + (1 − p) log σ(−Δr − m)].

    With K answers without ties the mean is over C(K, 2) pairs (Ouyang et al. 2022, equation 1); K = 2 is the pairwise loss
    (Stiennon et al. 2020). m is Llama 2's margin (Touvron et al. 2023b, equation 2); p < 1 a soft label.

    Args:
        margins_B, probabilities_B: m and p of each group.
    """
    wanted = pairs(ranks_BK, present_BK)
    difference = scores_BK[:, :, None] - scores_BK[:, None, :]
    margin, p = margins_B[:, None, None], probabilities_B[:, None, None]
    each = -(p * F.logsigmoid(difference - margin) + (1 - p) * F.logsigmoid(-difference - margin))
    return torch.where(wanted, each, 0.0).sum((1, 2)) / wanted.sum((1, 2)).clamp_min(1)


def ranking_accuracy(scores_BK: Tensor, ranks_BK: Tensor, present_BK: Tensor) -> tuple[Tensor, Tensor]:
    """(pairs whose better answer has the higher score, a tie counting half; pairs), scalars."""
    wanted = pairs(ranks_BK, present_BK)
    difference = scores_BK[:, :, None] - scores_BK[:, None, :]
    right = (difference > 0).float() + 0.5 * (difference == 0).float()
    return torch.where(wanted, right, 0.0).sum(), wanted.sum()
