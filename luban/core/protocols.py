"""Interfaces that packages of one layer share. No torch is imported here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

KeysValues: TypeAlias = "tuple[Tensor, Tensor]"  # (B, K, S, D) each


class LayerCache(Protocol):
    """The cache of one layer. B sequences, T new tokens, S tokens in the cache, K key heads, D head dim, E model width."""

    def update(self, keys: Tensor, values: Tensor) -> KeysValues:
        """Append the new tokens' keys and values (B, K, T, D); return all cached ones (B, K, S, D), in slot order."""
        ...

    def extend(self, number: int, new: Tensor) -> Tensor:
        """Append the new tokens' numbers (B, W, T) of a mixer's state; return those of all tokens that it keeps (B, W, S)."""
        ...

    def cross(self, project: Callable[[Tensor], KeysValues], states: Tensor | None) -> KeysValues:
        """Keys and values (B, K, S, D) of an encoder's states (B, S, E), projected on the first call only."""
        ...


class KVCache(Protocol):
    """Keys and values of the tokens already read, for every layer.

    A model calls `begin` once a forward; then each attention layer calls `update` of its own `LayerCache` once.
    """

    def begin(self, tokens: int, mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """Reserve slots for `tokens` new tokens; `mask` (B, T) bool, false where padding (None: no padding).

        Returns their positions (B, T) or (1, T): the given ones, or computed without counting padding.
        Raises ContextError when they don't fit.
        """
        ...

    def layer(self, index: int) -> LayerCache | None:
        """The cache of layer `index`; None for a layer without attention."""
        ...

    @property
    def valid(self) -> Tensor | None:
        """(B, S) bool, false where a slot holds padding; None: no padding."""
        ...

    @property
    def positions(self) -> Tensor:
        """(B, S) or (1, S): the position of the token in each slot."""
        ...


class Grounded(Protocol):
    """A conversation with passages before its last question."""

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation that the model reads."""
        ...

    @property
    def grammar(self) -> str | None:
        """What answers are held to (`luban.generate.structure.Structure.grammar`); None: nothing."""
        ...

    def citations(self, answer: str) -> list[dict[str, Any]]:
        """The passages that an answer cites: `mark`, `score`, `title`, `text`, `source`, `start`, `stop`."""
        ...


class Grounder(Protocol):
    """Finds passages for a conversation (`luban serve --index`)."""

    def ground(self, messages: Sequence[dict[str, Any]], fits: Callable[[list[dict[str, Any]]], bool]) -> Grounded:
        """The conversation with as many passages as fit the model's context, as `fits` says of its messages.

        Raises DataError where its last message is no question.
        """
        ...


class Answered(Protocol):
    """An answer that was written from passages."""

    @property
    def text(self) -> str:
        """Its words."""
        ...

    @property
    def token_ids(self) -> list[int]:
        """Its tokens, the end token included."""
        ...

    @property
    def prompt_token_ids(self) -> list[int]:
        """All tokens that were read for it."""
        ...

    @property
    def ended(self) -> bool:
        """Whether it has an end, and was not cut at the most tokens."""
        ...

    def citations(self, answer: str) -> list[dict[str, Any]]:
        """The passages that it comes from, as those of `Grounded`."""
        ...


class Answerer(Protocol):
    """Finds passages for a question and answers it in its own way (models of `luban rag train`, `luban serve --index`)."""

    def answer(self, question: str, max_tokens: int | None = None) -> Answered:
        """The answer, of `max_tokens` at most. Raises DataError where the context can't hold the question."""
        ...


class Retriever(Protocol):
    """Finds passages for a question."""

    def search(self, query: str, k: int) -> list[Any]:
        """The `k` best passages, best first: tables or objects with at least `text`, or with `row()`, which gives such a table."""
        ...
