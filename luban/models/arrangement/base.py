"""The family of arrangements, and the parts that all of them arrange.

B batch, T tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.opgraph import Op, within
from luban.core.registry import Registry, Variant
from luban.nn.context import LayerContext
from luban.nn.mixer.base import LayerShape

if TYPE_CHECKING:
    from luban.models.layer import LayerSpec


class RematPolicy(Protocol):
    """A policy of rematerialisation."""

    def run(self, function: Callable[[Tensor, LayerContext], Tensor], x: Tensor, ctx: LayerContext) -> Tensor:
        """function(x, ctx), keeping less for the backward pass."""
        ...


@dataclass(frozen=True, kw_only=True)
class Arrangement(Variant):
    """A family of arrangements."""

    registry: ClassVar[Registry] = Registry(
        "arrangement",
        {
            "pre": "luban.models.arrangement.pre:PreNorm",
            "post": "luban.models.arrangement.post:PostNorm",
            "parallel": "luban.models.arrangement.parallel:Parallel",
            "sandwich": "luban.models.arrangement.sandwich:SandwichNorm",
            "deepnorm": "luban.models.arrangement.deepnorm:DeepNorm",
            "chatglm": "luban.models.arrangement.chatglm:NormedResidual",
        },
    )
    block: ClassVar[type[Block]]  # the module
    final_norm: ClassVar[bool] = True  # whether the stream is normalised after the last layer
    crosses: ClassVar[bool] = False  # whether there is a form with cross-attention

    def check(self, layer: LayerSpec) -> None:
        """Raise ConfigError where the layer can't be arranged like this."""
        if layer.cross and not self.crosses:
            name = self.registry.name_of(type(self))
            raise ConfigError(
                f"the arrangement {name} has no form with cross-attention: encoder–decoders need pre or post"
            )

    def build(self, layer: LayerSpec, shape: LayerShape) -> Block:
        """The block of this layer."""
        return type(self).block(layer, shape)

    def norm_names(self) -> tuple[str, ...]:
        """Names of the layer's norms beside that of cross-attention."""
        return "mixer_norm", "feedforward_norm"

    def ops(self, layer: LayerSpec, shape: LayerShape, batch: int, seq: int, source: int | None = None) -> list[Op]:
        """What the layer does to a batch; `source`: encoder tokens that it attends to, where it does."""
        tokens, width = batch * seq, shape.width
        ops = [
            *(layer.norm.op(name, tokens, width) for name in self.norm_names()),
            *within("mixer", layer.mixer.ops(batch, seq, shape)),
        ]
        if layer.cross:
            ops.append(layer.norm.op("cross_norm", tokens, width))
            ops += within("cross", layer.mixer.cross_ops(batch, seq, seq if source is None else source, shape))
        return [*ops, *within("feedforward", layer.feedforward.ops(tokens, width))]


class Block(nn.Module):
    """A mixer, a feed-forward network and a norm beside each; cross-attention where the layer has it."""

    def __init__(self, layer: LayerSpec, shape: LayerShape):
        super().__init__()
        self.mixer_norm = layer.norm.build(shape.width)
        self.mixer = layer.mixer.build(shape)
        self.cross_norm = layer.norm.build(shape.width) if layer.cross else None
        self.cross = layer.mixer.build_cross(shape) if layer.cross else None
        self.feedforward_norm = layer.norm.build(shape.width)
        self.feedforward = layer.feedforward.build(shape)

        self.remat: RematPolicy | None = None

    def forward(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        return self.arranged(x_BTE, ctx) if self.remat is None else self.remat.run(self.arranged, x_BTE, ctx)

    def arranged(self, x_BTE: Tensor, ctx: LayerContext) -> Tensor:
        """The layer itself, (B, T, E) → (B, T, E)."""
        raise NotImplementedError

    def use_remat(self, remat: RematPolicy | None) -> None:
        """Compute again in the backward pass what `remat` doesn't keep; None: nothing."""
        self.remat = remat
