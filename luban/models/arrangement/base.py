"""Base config of arrangements (how a layer connects norms, mixer and feed-forward) and of their blocks.

B batch, T tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.registry import Registry, Variant
from luban.nn.context import LayerContext
from luban.nn.mixer.base import LayerShape

if TYPE_CHECKING:
    from luban.models.layer import LayerSpec


class RematPolicy(Protocol):
    """Activation checkpointing policy of a layer."""

    def run(self, function: Callable[[Tensor, LayerContext], Tensor], x: Tensor, ctx: LayerContext) -> Tensor:
        """function(x, ctx), saving less for the backward pass; x (B, T, E)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Arrangement(Variant):
    """Base config of arrangements (registry `arrangement`)."""

    registry: ClassVar[Registry] = Registry(
        "arrangement",
        {
            "pre": "luban.models.arrangement.pre:PreNorm",
            "post": "luban.models.arrangement.post:PostNorm",
            "parallel": "luban.models.arrangement.parallel:Parallel",
            "sandwich": "luban.models.arrangement.sandwich:SandwichNorm",
            "deepnorm": "luban.models.arrangement.deepnorm:DeepNorm",
            "reversible": "luban.models.arrangement.reversible:Reversible",
            "chatglm": "luban.models.arrangement.chatglm:NormedResidual",
        },
    )
    block: ClassVar[type[Block]]  # the module
    final_norm: ClassVar[bool] = True  # the stack ends with a norm
    crosses: ClassVar[bool] = False  # supports cross-attention
    undivided: ClassVar[frozenset[str]] = frozenset()  # axes of a plan that can't divide it
    reversible: ClassVar[bool] = (
        False  # consecutive layers keep two streams between them, and nothing for the backward pass
    )

    def check(self, layer: LayerSpec) -> None:
        """Raise ConfigError if the arrangement doesn't support the layer."""
        if layer.cross and not self.crosses:
            name = self.registry.name_of(type(self))
            raise ConfigError(
                f"the arrangement {name} doesn't support cross-attention: encoder–decoders need pre or post"
            )

    def build(self, layer: LayerSpec, shape: LayerShape) -> Block:
        """The block of this layer."""
        return type(self).block(layer, shape)

    def describe(self, parts: LayerParts, x_BTE: GraphTensor) -> GraphTensor:
        """Record the layer's operations, (B, T, E) → (B, T, E), connected as in its block's `arranged`."""
        raise NotImplementedError

    def describe_streams(self, parts: LayerParts, x1: GraphTensor, x2: GraphTensor) -> tuple[GraphTensor, GraphTensor]:
        """The same of a reversible layer, which has two streams."""
        raise NotImplementedError


class LayerParts:
    """Records the operations of one layer, for the arrangement that connects them.

    Args:
        bias: (1, H, T, T) on attention scores, learned by the layer's position method; None: no bias.
        states_BSE: encoder states, for cross-attention.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        layer: LayerSpec,
        shape: LayerShape,
        bias: GraphTensor | None = None,
        states_BSE: GraphTensor | None = None,
    ):
        self.graph, self.layer, self.shape = graph, layer, shape
        self.bias, self.states_BSE = bias, states_BSE

    def norm(self, name: str, x: GraphTensor) -> GraphTensor:
        """Record the norm of this name."""
        return self.layer.norm.describe(self.graph, name, x)

    def mixer(self, x: GraphTensor) -> GraphTensor:
        """Record the mixer."""
        return self.layer.mixer.describe(self.graph.scope("mixer"), x, self.shape, self.bias)

    def cross(self, x: GraphTensor) -> GraphTensor:
        """Record the mixer's cross-attention."""
        assert self.states_BSE is not None
        return self.layer.mixer.describe_cross(self.graph.scope("cross"), x, self.states_BSE, self.shape)

    def feedforward(self, x: GraphTensor) -> GraphTensor:
        """Record the feed-forward network."""
        return self.layer.feedforward.describe(self.graph.scope("feedforward"), x)

    def residual(self, name: str, *terms: GraphTensor) -> GraphTensor:
        """Record the residual connection of this name."""
        return self.graph.residual(f"{name}_residual", *terms)


class Block(nn.Module):
    """A Transformer layer: mixer, feed-forward network, a norm for each, and cross-attention if the layer has it."""

    reversible: ClassVar[bool] = False  # it is run with its neighbours (`luban.models.arrangement.reversible`)

    def __init__(self, layer: LayerSpec, shape: LayerShape):
        super().__init__()
        self.mixer_norm = layer.norm.build(shape.width)
        self.mixer = layer.mixer.build(shape)
        self.cross_norm = layer.norm.build(shape.width) if layer.cross else None
        self.cross = layer.mixer.build_cross(shape) if layer.cross else None
        self.feedforward_norm = layer.norm.build(shape.width)
        self.feedforward = layer.feedforward.build(shape)

        self.beside_mixer: nn.Module | None = (
            None  # an adapter's: reads what the mixer reads, and is added to what it gives
        )
        self.beside_feedforward: nn.Module | None = None  # the same beside the feed-forward network
        self.remat: RematPolicy | None = None

    def forward(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        return self.arranged(x_BTE, ctx) if self.remat is None else self.remat.run(self.arranged, x_BTE, ctx)

    def arranged(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """The layer's computation, (B, T, E) → (B, T, E)."""
        raise NotImplementedError

    def run_mixer(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """The mixer's output, with that of an adapter beside it, (B, T, E) → (B, T, E)."""
        y_BTE = self.mixer(x_BTE, ctx)
        return y_BTE if self.beside_mixer is None else y_BTE + self.beside_mixer(x_BTE)

    def run_feedforward(self, x_BTE: Tensor, ctx: LayerContext | None = None) -> Tensor:
        """The feed-forward network's output, with that of an adapter beside it, (B, T, E) → (B, T, E)."""
        y_BTE = self.feedforward(x_BTE, ctx)
        return y_BTE if self.beside_feedforward is None else y_BTE + self.beside_feedforward(x_BTE)

    def add_beside(self, part: Literal["mixer", "feedforward"], adapter: nn.Module) -> None:
        """Let `adapter(x)`, (B, T, E) → (B, T, E), read what the part reads and add to what it gives."""
        setattr(self, f"beside_{part}", adapter)

    def use_remat(self, remat: RematPolicy | None) -> None:
        """Recompute in the backward pass what `remat` doesn't save; None: save everything."""
        self.remat = remat
