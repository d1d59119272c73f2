"""Interfaces that packages of one layer share. No torch is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class LayerCache(Protocol):
    """What one layer keeps. B sequences, T new tokens, S tokens in the cache, K key heads, D head dim."""

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) of the new tokens; return (B, K, S, D) of all of them, in slot order."""
        ...

    def cross(self, project: Callable[[Tensor], tuple[Tensor, Tensor]], states: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of an encoder's states, projected once."""
        ...


class KVCache(Protocol):
    """Keys and values of the tokens already read, for every layer.

    A model calls `begin` once a forward; then each of its attention layers calls `update` of its own part once.
    """

    def begin(self, tokens: int, mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """Add slots for `tokens` new tokens; `mask` (B, T) says which are real (None: all).

        Returns their positions (B, T) or (1, T): those given, or else counted over real tokens only.
        Raises ContextError when they don't fit.
        """
        ...

    def layer(self, index: int) -> LayerCache | None:
        """The part of one layer; None for a layer that keeps nothing."""
        ...

    @property
    def valid(self) -> Tensor | None:
        """(B, S) bool, true where a slot holds a real token; None when all do."""
        ...

    @property
    def positions(self) -> Tensor:
        """(B, S) or (1, S): the position of the token in each slot."""
        ...
