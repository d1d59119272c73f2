"""Base config of token mixers, and the sizes that modules of a layer are built with.

B batch, T tokens, S encoder tokens, E model width, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import nn

from luban.core.errors import ConfigError
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
    context: int = 0  # longest sequence of the model in tokens; 0: not known


class TokenState(NamedTuple):
    """Numbers that a mixer keeps of earlier tokens while it generates, beside keys and values."""

    width: int  # numbers a token
    last: int | None = None  # of so many tokens before the new ones; None: of all
    integer: bool = False  # int64; else in the model's precision
    padding: float = 0.0  # where a slot holds no token


class AttentionShape(NamedTuple):
    """Sizes that masks and caches of an attention layer depend on."""

    heads: int  # H, query heads
    key_heads: int  # K, heads of keys and values
    head_dim: int  # D
    window: int | None = None  # attend to itself and the window − 1 tokens before it; None: all
    layout: Layout | None = None  # block-sparse layout; None: all blocks
    masked: bool = True  # it attends by the backend's mask; False: the mixer itself decides which keys a query sees

    def density(self, seq: int, *, causal: bool) -> float:
        """Fraction of the T × T scores that causal mask, window and layout leave; diagonal entries count ½."""
        if self.layout is None:
            return mask_density(seq, self.window, causal=causal)
        return self.layout.density(seq, self.heads, causal)


@dataclass(frozen=True, kw_only=True)
class Mixer(Variant):
    """Base config of token mixers (registry `mixer`)."""

    registry: ClassVar[Registry] = Registry(
        "mixer",
        {
            "grouped": "luban.nn.mixer.grouped:Grouped",
            "dilated": "luban.nn.mixer.dilated:Dilated",
            "hyena": "luban.nn.mixer.hyena:Hyena",
            "lsh": "luban.nn.mixer.lsh:LSH",
            "routing": "luban.nn.mixer.routing:Routing",
        },
    )

    crosses: ClassVar[bool] = False  # has a form for cross-attention to an encoder
    bidirectional: ClassVar[bool] = False  # has a form for encoders, in which tokens see later ones
    sees_prefix: ClassVar[bool] = False  # a causal layer can let all tokens of a document see its prefix
    prompted: ClassVar[bool] = False  # its module takes prompts with a softmax of their own, by `add_prompts`
    biased: ClassVar[bool] = False  # adds a position method's bias to its scores
    online: ClassVar[bool] = False  # `module.update_statistics()` is to be called before every forward in training
    undivided: ClassVar[frozenset[str]] = frozenset()  # axes of a plan that can't divide it

    def check(self, width: int) -> None:
        """Raise ConfigError if the mixer doesn't fit a model of `width`."""

    def attention(self, width: int) -> AttentionShape | None:
        """Sizes for masks and caches; None for a mixer without attention."""
        return None

    def state_spec(self, width: int) -> tuple[TokenState, ...]:
        """What it keeps of earlier tokens while it generates, beside the keys and values of `attention`."""
        return ()

    def random_numbers(self, width: int, *, training: bool) -> tuple[int, ...] | None:
        """Shape of the normal numbers that `ctx.numbers` must hold, drawn anew for every forward in training and always the
        same outside of it; None: it needs none."""
        return None

    def refusal(self, *, causal: bool, cross: bool) -> str | None:
        """Why it can't stand in such a stack; None: it can."""
        if cross and not self.crosses:
            return "it has no cross-attention: the decoder of an encoder–decoder needs grouped"
        if not causal and not self.bidirectional:
            others = [name for name in self.registry if self.registry[name].bidirectional]
            return f"it reads from left to right only: an encoder needs {' or '.join(others)}"
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


class HeadedMixer(Mixer):
    """Base config of mixers with heads, which split the width unless `head_dim` gives their own."""

    heads: int
    head_dim: int | None

    def check(self, width: int) -> None:
        """Without a head_dim of their own the heads split the width."""
        if self.head_dim is None and width % self.heads:
            raise ConfigError(
                f"width {width} can't be split over {self.heads} heads: choose heads that divide it, or give head_dim"
            )

    def head_width(self, width: int) -> int:
        """D."""
        return width // self.heads if self.head_dim is None else self.head_dim
