"""Base config of routers: how a token chooses its experts.

B rows, T tokens, X experts, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant
from luban.nn.context import RouterTraining
from luban.nn.moe.routing import Choices

GOLDEN = 0.6180339887498949  # its multiples modulo 1 give every layer other random numbers


@dataclass(frozen=True, kw_only=True)
class Router(Variant):
    """Base config of routers (registry `router`)."""

    registry: ClassVar[Registry] = Registry(
        "router",
        {
            "top_k": "luban.nn.moe.top_k:TopK",
            "gshard": "luban.nn.moe.gshard:GShard",
            "switch": "luban.nn.moe.switch:Switch",
        },
    )
    random: ClassVar[bool] = False  # training needs a random number a token
    drops: ClassVar[bool] = False  # experts have a capacity in training
    balance: float = 0.01  # factor on the load-balancing loss (1 for a uniform router)
    z_loss: float = 0.0  # factor on the router z-loss, log²Z of its logits; 0.001 in ST-MoE

    def __post_init__(self):
        for name in ("balance", "z_loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"router.{name} is a factor from 0 on, {getattr(self, name)} given")

    def check(self, experts: int) -> None:
        """Raise ConfigError if it doesn't fit so many experts."""
        if self.chosen > experts:
            name = self.registry.name_of(type(self))
            raise ConfigError(
                f"the router {name} gives a token {self.chosen} experts, and there are {experts}: use at least {self.chosen}"
            )

    @property
    def chosen(self) -> int:
        """k, experts that a token chooses."""
        raise NotImplementedError

    def balanced(self) -> int:
        """How many of a token's choices, best first, the balance loss counts."""
        return self.chosen

    def choose(self, probabilities_BTX: Tensor, training: RouterTraining | None, layer: int) -> Choices:
        """The experts of every token.

        Args:
            training: None outside of training, where no router drops a choice.
            layer: index in the stack, for random numbers.
        """
        raise NotImplementedError


def check_capacity(capacity: float) -> None:
    """Raise ConfigError for a capacity factor that leaves experts without tokens."""
    if not capacity > 0:
        raise ConfigError(f"router.capacity must be above 0, {capacity} given")


def slots_taken(experts_BT: Tensor, wanted_BT: Tensor, before_BX: Tensor) -> tuple[Tensor, Tensor]:
    """The places of tokens in their experts' queues, first come, first served within a row.

    Args:
        experts_BT: the expert that each token asks for; wanted_BT: bool, whether it does.
        before_BX: tokens already in each queue.

    Returns:
        (B, T) int64, the number of tokens before each one, and (B, X), the queues' new lengths.
    """
    asked_BTX = torch.zeros(*experts_BT.shape, before_BX.shape[1], dtype=torch.int64, device=experts_BT.device)
    asked_BTX.scatter_(2, experts_BT[..., None], wanted_BT[..., None].to(torch.int64))
    queue_BTX = asked_BTX.cumsum(1) - asked_BTX + before_BX[:, None]
    return queue_BTX.gather(2, experts_BT[..., None])[..., 0], before_BX + asked_BTX.sum(1)
