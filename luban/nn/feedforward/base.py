"""The family of feed-forward networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.opgraph import Op, linear_op
from luban.core.registry import Registry, Variant
from luban.nn.mixer.base import LayerShape

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class FeedForward(Variant):
    """A family of feed-forward networks."""

    registry: ClassVar[Registry] = Registry(
        "feed-forward",
        {
            "swiglu": "luban.nn.feedforward.gated:SwiGLU",
            "geglu": "luban.nn.feedforward.gated:GEGLU",
            "geglu_tanh": "luban.nn.feedforward.gated:TanhGEGLU",
            "gelu": "luban.nn.feedforward.plain:GELU",
            "gelu_tanh": "luban.nn.feedforward.plain:TanhGELU",
            "relu": "luban.nn.feedforward.plain:ReLU",
        },
    )
    activation: ClassVar[Activation]
    gated: ClassVar[bool] = False
    input_kept: ClassVar[bool] = True  # the activation's gradient needs its input, not its output
    width: int = 768  # inner width
    bias: bool = False  # biases on every matmul

    def __post_init__(self):
        if self.width < 1:
            raise ConfigError(f"feed-forward width must be at least 1, {self.width} given")

    def build(self, shape: LayerShape) -> nn.Module:
        """The module: (B, T, E) → (B, T, E)."""
        raise NotImplementedError

    def ops(self, tokens: int, width: int) -> list[Op]:
        """Its matmuls and activation over `tokens` rows."""
        names = ("gate", "up") if self.gated else ("up",)
        inner = [linear_op(name, tokens, width, self.width, bias=self.bias, keeps=self.input_kept) for name in names]
        product = Op(name="activation", kind="activation", activation=tokens * self.width)
        return [*inner, product, linear_op("down", tokens, self.width, width, bias=self.bias)]
