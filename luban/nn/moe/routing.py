"""What a router decides, its auxiliary losses, and how these reach the gradient.

B rows, T tokens, N = B·T, X experts, k experts a token, E model width. Losses are computed row by row and averaged with the rows'
shares of the step's loss, so that they don't depend on micro-batches, processes or recomputation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

RowSum = Callable[[Tensor], Tensor]  # (B, …) sums over this process's tokens of each row → over all tokens of the row


class Choices(NamedTuple):
    """The experts of every token, best first."""

    experts_BTk: Tensor  # int64
    weights_BTk: Tensor  # of the experts' outputs, float32 (float64 for float64 models)
    kept_BTk: Tensor | None = None  # bool, false where the expert isn't computed; None: all are
    dropped: Tensor | None = None  # () choices of real tokens lost for want of capacity; None: none


def counts_by_row(experts_BTk: Tensor, experts: int, valid_BT: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, X): how often each expert is chosen in each row, padding not counted."""
    ones = torch.ones_like(experts_BTk, dtype=dtype)
    if valid_BT is not None:
        ones = ones * valid_BT[..., None]
    found = torch.zeros(experts_BTk.shape[0], experts, dtype=dtype, device=experts_BTk.device)
    return found.scatter_add_(1, experts_BTk.flatten(1), ones.flatten(1))


def row_means(values_BTX: Tensor, valid_BT: Tensor | None, row_sum: RowSum) -> Tensor:
    """(B, X): means over the valid tokens of each row; 0 for a row without any."""
    if valid_BT is None:
        count = values_BTX.new_full((values_BTX.shape[0], 1), float(values_BTX.shape[1]))
    else:
        values_BTX = values_BTX * valid_BT[..., None]
        count = valid_BT.sum(1, keepdim=True).to(values_BTX.dtype)
    return row_sum(values_BTX.sum(1)) / row_sum(count).clamp_min(1)


def balance_loss(probabilities_BTX: Tensor, counts_BX: Tensor, valid_BT: Tensor | None, row_sum: RowSum) -> Tensor:
    """(B,): X · Σ_e f_e · P_e of each row, with f_e the share of choices that fell on expert e, which has no gradient, and P_e
    its mean probability. 1 for a router that is uniform.

    It is X² times l_aux of GShard (Lepikhin et al. 2021, algorithm 1) and equation 4 of Switch Transformers (Fedus et al.
    2022) before its factor α.
    """
    chosen_BX = row_sum(counts_BX.detach())
    share_BX = chosen_BX / chosen_BX.sum(1, keepdim=True).clamp_min(1)
    mean_BX = row_means(probabilities_BTX, valid_BT, row_sum)
    return probabilities_BTX.shape[-1] * (share_BX * mean_BX).sum(1)


def router_z_loss(logits_BTX: Tensor, valid_BT: Tensor | None, row_sum: RowSum) -> Tensor:
    """(B,): mean over each row's tokens of log²Σ_e exp(logit_e) (Zoph et al. 2022, ST-MoE, equation 5)."""
    return row_means(logits_BTX.logsumexp(-1, keepdim=True).square(), valid_BT, row_sum)[:, 0]


@dataclass
class Tally:
    """What a router did in the backward passes since `take`: one vector, so that it can be summed over processes.

    Args:
        experts: X.
    """

    experts: int
    total: Tensor | None = None  # (X + 5,)

    FIGURES = 5  # behind the X counts: choices, dropped ones, Σ weight · balance loss, Σ weight · z loss, Σ weight

    def add(self, figures: Tensor) -> None:
        """Add those of a micro-batch."""
        self.total = figures if self.total is None else self.total + figures

    def take(self) -> Tensor | None:
        """The sums, which begin anew; None: there was no backward pass."""
        found, self.total = self.total, None
        return found


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, figures: Tensor, tally: Tally) -> Tensor:
        ctx.tally, ctx.like = tally, loss
        ctx.figures = figures
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        ctx.tally.add(ctx.figures)
        return gradient, torch.ones_like(ctx.like), None, None


def attach_loss(x: Tensor, loss: Tensor, figures: Tensor, tally: Tally) -> Tensor:
    """x, whose backward pass adds the gradient of `loss` () as well and counts `figures`: once a backward pass, however often
    the forward pass is computed again, and in whichever stage of a pipeline."""
    return _AttachLoss.apply(x, loss, figures, tally)
