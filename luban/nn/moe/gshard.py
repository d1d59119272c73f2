"""GShard: two experts a token with a capacity, the second one at random (Lepikhin et al. 2021, section 2.2, algorithm 1).

GLaM (Du et al. 2022, section 4) has these in every second layer: `[[model.pattern]]` with `every = 2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from luban.nn.context import RouterTraining
from luban.nn.moe.router import GOLDEN, Router, check_capacity, slots_taken
from luban.nn.moe.routing import Choices


@dataclass(frozen=True, kw_only=True)
class GShard(Router):
    """The two likeliest experts, weighted by their probabilities over the sum of the two.

    In training an expert computes 2 · capacity · T / X tokens of a row (rounded up): a row is a group of algorithm 1. First
    choices are dispatched before second ones, each from left to right; a token is dispatched to its second expert with
    probability min(1, 2 · its weight). Choices beyond the capacity are dropped: they add nothing to the residual stream. Outside
    of training both experts are always computed. The balance loss counts first choices alone.

    Departure: a second expert to which a token isn't dispatched loses none of its capacity.
    """

    random = True
    drops = True
    capacity: float = 1.0  # capacity factor; 2 · capacity · T / X tokens of a row

    def __post_init__(self):
        super().__post_init__()
        check_capacity(self.capacity)

    @property
    def chosen(self) -> int:
        """Two."""
        return 2

    def balanced(self) -> int:
        """First choices."""
        return 1

    def choose(self, probabilities_BTX: Tensor, training: RouterTraining | None, layer: int) -> Choices:
        """The two likeliest, up to the experts' capacity."""
        weights, experts = probabilities_BTX.topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        if training is None:
            return Choices(experts, weights)
        tokens, count = probabilities_BTX.shape[1:]
        slots = ceil(2 * self.capacity * tokens / count)
        real = training.real(experts[..., 0])
        asked = real
        if training.noise_BT is not None:
            draw = (training.noise_BT + layer * GOLDEN).frac()
            asked = real & (2 * weights[..., 1] > draw)
        first, queue = slots_taken(experts[..., 0], real, torch.zeros_like(experts[:, 0, :1].expand(-1, count)))
        second, _ = slots_taken(experts[..., 1], asked, queue)
        kept = torch.stack([real & (first < slots), asked & (second < slots)], dim=-1)
        dropped = (real & ~kept[..., 0]).sum() + (asked & ~kept[..., 1]).sum()
        return Choices(experts, weights, kept, dropped)
