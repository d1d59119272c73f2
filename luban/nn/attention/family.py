"""The family of attention forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from luban.core.opgraph import Op
from luban.core.registry import Registry, Variant


@dataclass(frozen=True, kw_only=True)
class Attention(Variant):
    """A family of attention forms; every one has heads, and keys and values that a cache can hold."""

    registry: ClassVar[Registry] = Registry("attention", {"grouped": "luban.nn.attention.grouped:Grouped"})
    heads: int = 8  # query heads
    window: int | None = None  # a token sees itself and the window − 1 before it; none: all
    windowed: tuple[bool, ...] = (True,)  # which layers the window holds for, repeated over the depth

    def check(self, width: int) -> None:
        """Raise ConfigError where the form doesn't fit a model of `width`."""

    def window_of(self, layer: int) -> int | None:
        """The window of one layer; none: all."""
        return self.window if self.windowed[layer % len(self.windowed)] else None

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
