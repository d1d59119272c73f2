"""The recurrent body: an embedding, layers of one kind of cell, a head.

B batch, T tokens, N sequences (documents of packed rows), L tokens of the longest, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from luban.core.errors import DataError
from luban.core.opgraph import Op, within
from luban.models.body import Body, BodyModule, refuse_parts_of_transformers
from luban.nn.recurrent.family import Cell, sequences
from luban.nn.recurrent.plain import LSTM

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class RecurrentBody(Body):
    """Reads tokens one after the other, without a Transformer's parts."""

    causal = True
    cell: Cell = field(default_factory=LSTM)  # of every layer

    def check(self, spec: ModelSpec) -> None:
        """No part of a Transformer is given, as it would do nothing."""
        refuse_parts_of_transformers(spec)

    def build(self, spec: ModelSpec) -> Recurrent:
        """The module with its head."""
        return Recurrent(spec)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """Embedding and layers."""
        tokens = batch * seq
        ops = [Op(name="embedding", kind="embedding", parameters=spec.vocab_size * spec.width,
                  activation=tokens * spec.width)]  # fmt: skip
        for layer in range(spec.layers):
            ops += within(f"layers.{layer}", self.cell.ops(tokens, spec.width, spec.width))
        return ops


class Recurrent(BodyModule):
    """Its parameters are its only state."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        assert isinstance(spec.body, RecurrentBody)
        self.embedding = nn.Embedding(spec.vocab_size, spec.width)
        self.layers = nn.ModuleList(spec.body.cell.build(spec.width, spec.width) for _ in range(spec.layers))
        self.readout = spec.head.build(spec)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, *, documents: Tensor | None = None,
                positions: Tensor | None = None, segments: Tensor | None = None, cache: None = None,
                starts: Tensor | None = None, output: Literal["logits", "hidden"] = "logits") -> Tensor:  # fmt: skip
        """What the head makes of every place, or the hidden states (B, T, E).

        Args:
            tokens: (B, T) int64.
            mask: (B, T) bool, true where a token is real (padding may be left or right).
            documents: (B, T) int; every document begins with an empty state.
            positions: not used: order is all a recurrence knows.
            segments: (B, T) int; the tokens of segment 0 are the input, the others the room for the answer (a tape
                jumps by the input's length); default: all are input.
            cache: none. DataError if there is one.
            starts: not used: `documents` say it all.
        """
        if cache is not None:
            raise DataError("a recurrent body keeps no keys and values: it has no cache")
        x_BTE = self.embedding(tokens)
        given = torch.ones_like(tokens) if segments is None else (segments == 0).long()
        if mask is not None or documents is not None:
            places, real = sequences(joint(mask, documents, tokens))
            x_NLE = x_BTE.flatten(0, 1)[places]
            y_NLE = self.run(x_NLE, (given.flatten()[places] * real).sum(-1))
            hidden = torch.zeros_like(x_BTE).flatten(0, 1).index_put((places[real],), y_NLE[real]).view_as(x_BTE)
        else:
            hidden = self.run(x_BTE, given.sum(-1))
        return hidden if output == "hidden" else self.head(hidden, mask)

    def run(self, x_NLE: Tensor, given_N: Tensor) -> Tensor:
        """(N, L, E) → (N, L, E) through all layers."""
        for layer in self.layers:
            x_NLE = layer(x_NLE, given_N)
        return x_NLE


def joint(mask: Tensor | None, documents: Tensor | None, tokens: Tensor) -> Tensor:
    """(B, T): a number that changes where a document or a run of padding begins."""
    documents = torch.zeros_like(tokens) if documents is None else documents
    return documents if mask is None else torch.where(mask, documents, -1)
