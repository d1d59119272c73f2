"""Base config of token mixers, and the sizes that modules of a layer are built with.

B batch, T tokens, S encoder tokens, E model width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import nn

from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor, mask_density
from luban.core.registry import Registry, Variant
from luban.nn.mixer.layout import Layout


class LayerShape(NamedTuple):
    """Sizes of a layer and its place in the stack."""

    width: int  # E, of the model
    index: int  # of the layer in its stack, from 0
    layers: int  # in the stack
    causal: bool  # tokens attend only to themselves and earlier tokens


class AttentionShape(NamedTuple):
    """Sizes that masks and caches of an attention layer depend on."""

    heads: int  # H, query heads
    key_heads: int  # K, heads of keys and values
    head_dim: int  # D
    window: int | None = None  # attend to itself and the window − 1 tokens before it; None: all
    layout: Layout | None = None  # block-sparse layout; None: all blocks

    def density(self, seq: int, *, causal: bool) -> float:
        """Fraction of the T × T scores that causal mask, window and layout leave; diagonal entries count ½."""
        if self.layout is None:
            return mask_density(seq, self.window, causal=causal)
        return self.layout.density(seq, self.heads, causal)


@dataclass(frozen=True, kw_only=True)
class Mixer(Variant):
    """Base config of token mixers (registry `mixer`)."""

    registry: ClassVar[Registry] = Registry("mixer", {"grouped": "luban.nn.mixer.grouped:Grouped"})

    def check(self, width: int) -> None:
        """Raise ConfigError if the mixer doesn't fit a model of `width`."""

    def attention(self, width: int) -> AttentionShape | None:
        """Sizes for masks and caches; None for a mixer without attention."""
        return None

    def build(self, shape: LayerShape) -> nn.Module:
        """The module: `mixer(x_BTE, ctx) -> (B, T, E)`, `ctx` a `luban.nn.context.LayerContext`."""
        raise NotImplementedError

    def build_cross(self, shape: LayerShape) -> nn.Module:
        """The module for cross-attention to an encoder's states. Raises ConfigError if the mixer has no such form."""
        raise NotImplementedError

    def describe(
        self, graph: GraphBuilder, x_BTE: GraphTensor, shape: LayerShape, bias: GraphTensor | None
    ) -> GraphTensor:
        """Record its operations on x, (B, T, E) → (B, T, E).

        Args:
            bias: (1, H, T, T), learned bias of the layer's position method on attention scores; None: no bias.
        """
        raise NotImplementedError

    def describe_cross(
        self, graph: GraphBuilder, x_BTE: GraphTensor, states_BSE: GraphTensor, shape: LayerShape
    ) -> GraphTensor:
        """Record its cross-attention from x to an encoder's states, (B, T, E) and (B, S, E) → (B, T, E)."""
        raise NotImplementedError
