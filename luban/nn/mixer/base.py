"""The family of mixers, and what a layer tells the parts that are built for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import nn

from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor, mask_density
from luban.core.registry import Registry, Variant
from luban.nn.mixer.layout import Layout


class LayerShape(NamedTuple):
    """The layer that a part is built for."""

    width: int  # E, of the model
    index: int  # of the layer in its stack, from 0
    layers: int  # in the stack
    causal: bool  # a token sees only those before it


class AttentionShape(NamedTuple):
    """What a mixer that attends needs of masks and caches."""

    heads: int  # H, query heads
    key_heads: int  # K, heads of keys and values
    head_dim: int  # D
    window: int | None = None  # a token sees itself and the window − 1 before it; None: all
    layout: Layout | None = None  # blocks of keys that a block of queries sees; None: all

    def density(self, seq: int, *, causal: bool) -> float:
        """Share of the T × T scores that mask, window and layout leave, the diagonal halved."""
        if self.layout is None:
            return mask_density(seq, self.window, causal=causal)
        return self.layout.density(seq, self.heads, causal)


@dataclass(frozen=True, kw_only=True)
class Mixer(Variant):
    """A family of mixers."""

    registry: ClassVar[Registry] = Registry("mixer", {"grouped": "luban.nn.mixer.grouped:Grouped"})

    def check(self, width: int) -> None:
        """Raise ConfigError where the mixer doesn't fit a model of `width`."""

    def attention(self, width: int) -> AttentionShape | None:
        """What it needs of masks and caches; None where it doesn't attend."""
        return None

    def build(self, shape: LayerShape) -> nn.Module:
        """The module: `mixer(x_BTE, ctx) -> (B, T, E)`, `ctx` a `luban.nn.context.LayerContext`."""
        raise NotImplementedError

    def build_cross(self, shape: LayerShape) -> nn.Module:
        """The same attending to what an encoder made. Raises ConfigError where there is no such form."""
        raise NotImplementedError

    def describe(
        self, graph: GraphBuilder, x_BTE: GraphTensor, shape: LayerShape, bias: GraphTensor | None
    ) -> GraphTensor:
        """Record its operations on x, (B, T, E) → (B, T, E).

        Args:
            bias: (1, H, T, T), learned by the layer's position method, which attention adds to its scores; None: none.
        """
        raise NotImplementedError

    def describe_cross(
        self, graph: GraphBuilder, x_BTE: GraphTensor, states_BSE: GraphTensor, shape: LayerShape
    ) -> GraphTensor:
        """Record its cross-attention from x to an encoder's states, (B, T, E) and (B, S, E) → (B, T, E)."""
        raise NotImplementedError
