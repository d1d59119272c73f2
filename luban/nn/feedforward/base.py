"""Base config of feed-forward networks. B batch, T tokens, E model width, I inner width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.registry import Registry, Variant
from luban.nn.mixer.base import LayerShape

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class FeedForward(Variant):
    """Base config of feed-forward networks (registry `feed-forward`)."""

    registry: ClassVar[Registry] = Registry(
        "feed-forward",
        {
            "swiglu": "luban.nn.feedforward.gated:SwiGLU",
            "geglu": "luban.nn.feedforward.gated:GEGLU",
            "geglu_tanh": "luban.nn.feedforward.gated:TanhGEGLU",
            "gelu": "luban.nn.feedforward.plain:GELU",
            "gelu_tanh": "luban.nn.feedforward.plain:TanhGELU",
            "relu": "luban.nn.feedforward.plain:ReLU",
            "moe": "luban.nn.moe.layer:MixtureOfExperts",
        },
    )
    activation: ClassVar[Activation]
    gated: ClassVar[bool] = False
    tokenwise: ClassVar[bool] = True  # a token's output depends on it alone, in training too
    input_kept: ClassVar[bool] = True  # the activation's gradient needs its input, not its output
    width: int = 768  # inner width
    bias: bool = False  # biases on every matmul

    def __post_init__(self):
        if self.width < 1:
            raise ConfigError(f"feed-forward width must be at least 1, {self.width} given")

    @property
    def recomputed(self) -> bool:
        """True if its GPU kernels recompute the activation in the backward pass instead of saving its output."""
        return False

    def build(self, shape: LayerShape) -> nn.Module:
        """The module: `feedforward(x_BTE, ctx) -> (B, T, E)`, `ctx` a `luban.nn.context.LayerContext`."""
        raise NotImplementedError

    def describe(self, graph: GraphBuilder, x_BTE: GraphTensor) -> GraphTensor:
        """Record its matmuls and activation on x, (B, T, E) → (B, T, E)."""
        inner_BTI = [
            graph.linear(
                role, x_BTE, self.width, role=role, bias=self.bias, joint=self.gated, saves_output=self.input_kept
            )
            for role in (("gate", "up") if self.gated else ("up",))
        ]
        first = inner_BTI[0]
        product_BTI = graph.add(
            "activation", "activation", *inner_BTI, shape=first.shape, saved_elements=first.elements
        )
        return graph.linear("down", product_BTI, x_BTE.shape[-1], role="down", bias=self.bias)
