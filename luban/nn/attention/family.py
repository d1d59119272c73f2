"""The family of attention forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import nn

from luban.core.opgraph import Op, seen_share
from luban.core.registry import Registry, Variant
from luban.nn.attention.layout import Layout


class Limits(NamedTuple):
    """What a layer's tokens see of what the mask leaves; none: all of it."""

    window: int | None = None  # tokens
    layout: Layout | None = None


@dataclass(frozen=True, kw_only=True)
class Attention(Variant):
    """A family of attention forms; every one has heads, and keys and values that a cache can hold."""

    registry: ClassVar[Registry] = Registry("attention", {"grouped": "luban.nn.attention.grouped:Grouped"})
    heads: int = 8  # query heads
    window: int | None = None  # a token sees itself and the window − 1 before it; none: all
    layout: Layout | None = None  # the blocks of keys that a block of queries sees; none: all
    windowed: tuple[bool, ...] = (True,)  # which layers window and layout hold for, repeated over the depth

    def check(self, width: int) -> None:
        """Raise ConfigError where the form doesn't fit a model of `width`."""

    def limits_of(self, layer: int) -> Limits:
        """Window and layout of one layer."""
        return Limits(self.window, self.layout) if self.windowed[layer % len(self.windowed)] else Limits()

    def seen_share(self, layer: int, seq: int, *, causal: bool) -> float:
        """Share of the square of scores that a layer's mask leaves, its diagonal halved."""
        window, layout = self.limits_of(layer)
        if layout is None:
            return seen_share(seq, window, causal=causal)
        return layout.seen_share(seq, self.heads, causal)

    def head_width(self, width: int) -> int:
        """D, the width of a head."""
        raise NotImplementedError

    def key_heads(self) -> int:
        """K, heads of keys and values."""
        raise NotImplementedError

    def build(self, width: int) -> nn.Module:
        """The module: `attention(x_BTE, frame, layer) -> (B, T, E)`."""
        raise NotImplementedError

    def ops(self, batch: int, seq: int, width: int) -> list[Op]:
        """Its products for a batch."""
        raise NotImplementedError
