"""Switch Transformers: one expert a token, weighted by its probability, with a capacity (Fedus et al. 2022, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from luban.nn.context import RouterTraining
from luban.nn.moe.router import Router, check_capacity, slots_taken
from luban.nn.moe.routing import Choices


@dataclass(frozen=True, kw_only=True)
class Switch(Router):
    """The likeliest expert. In training an expert computes capacity · T / X tokens of a row (rounded up), the first ones that
    chose it; the others are dropped: the layer adds nothing to their residual stream. Outside of training none is dropped."""

    drops = True
    capacity: float = 1.25  # capacity factor

    def __post_init__(self):
        super().__post_init__()
        check_capacity(self.capacity)

    @property
    def chosen(self) -> int:
        """One."""
        return 1

    def choose(self, probabilities_BTX: Tensor, training: RouterTraining | None, layer: int) -> Choices:
        """The likeliest, up to its capacity."""
        weights, experts = probabilities_BTX.max(-1, keepdim=True)
        if training is None:
            return Choices(experts, weights)
        tokens, count = probabilities_BTX.shape[1:]
        real = training.real(experts[..., 0])
        place, _ = slots_taken(experts[..., 0], real, torch.zeros_like(experts[:, 0].expand(-1, count)))
        kept = real & (place < ceil(self.capacity * tokens / count))
        return Choices(experts, weights, kept[..., None], (real & ~kept).sum())
