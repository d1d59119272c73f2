"""What siblings share: the shape of a thing, without the room that makes it. No torch is imported here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class KVCache(Protocol):
    """Keys and values of the tokens already read, for every layer.

    A body calls `begin` once a forward, then each of its attention layers calls `update` once.
    Shapes: B sequences, T new tokens, S tokens in the cache after this forward, K key heads, D head width.
    """

    def begin(self, tokens: int, mask: Tensor | None) -> Tensor:
        """Make room for `tokens` new slots; `mask` (B, T) says which are real (None: all).

        Returns their positions (B, T) or (1, T), counted over real tokens only.
        Raises ContextError when they don't fit.
        """
        ...

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, T, D) of the new tokens; return (B, K, S, D) of all of them, in slot order."""
        ...

    @property
    def valid(self) -> Tensor | None:
        """(B, S) bool, true where a slot holds a real token; None when all do."""
        ...

    @property
    def positions(self) -> Tensor:
        """(B, S) or (1, S): the position of the token in each slot."""
        ...
