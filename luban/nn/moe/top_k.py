"""Dropless top-k: every token reads its k likeliest experts, whatever their load (Jiang et al. 2024, Mixtral, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luban.core.errors import ConfigError
from luban.nn.context import RouterTraining
from luban.nn.moe.router import Router
from luban.nn.moe.routing import Choices


@dataclass(frozen=True, kw_only=True)
class TopK(Router):
    """The k likeliest experts, without a capacity."""

    active: int = 2  # k, experts a token
    normalise: bool = True  # divide the k probabilities by their sum (Mixtral); false: as they are (Qwen 1.5 MoE)

    def __post_init__(self):
        super().__post_init__()
        if self.active < 1:
            raise ConfigError(f"router.active must be at least 1, {self.active} given")

    @property
    def chosen(self) -> int:
        """`active`."""
        return self.active

    def choose(self, probabilities_BTX: Tensor, training: RouterTraining | None, layer: int) -> Choices:
        """The likeliest."""
        weights, experts = probabilities_BTX.topk(self.active, dim=-1)
        return Choices(experts, weights / weights.sum(-1, keepdim=True) if self.normalise else weights)
