"""The recurrent body: an embedding, layers of one kind of cell, a head.

B batch, T tokens, N sequences (documents of packed rows), L tokens of the longest, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.protocols import KVCache
from luban.models.base import Body, ModelInput, OneSidedModel, refuse_transformer_fields
from luban.nn.attention.backend import AttentionBackend
from luban.nn.embedding import Embedding
from luban.nn.recurrent.base import Cell, sequences
from luban.nn.recurrent.plain import LSTM

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class RecurrentBody(Body):
    """Reads tokens one after the other, without a Transformer's parts."""

    stacked = False
    causal = True
    fixed_shapes = False
    layers: int = 2  # of cells
    cell: Cell = field(default_factory=LSTM)  # of every layer

    def check(self, spec: ModelSpec) -> None:
        """No part of a Transformer is given, as it would do nothing."""
        if self.layers < 1:
            raise ConfigError(f"model.body.layers must be at least 1, {self.layers} given")
        refuse_transformer_fields(spec)

    def build(self, spec: ModelSpec) -> Recurrent:
        """The module with its head."""
        return Recurrent(spec)

    def describe(self, graph: GraphBuilder, spec: ModelSpec, batch: int, seq: int, target: int | None) -> GraphTensor:
        """Embedding and layers."""
        x_BTE = describe_embedding(graph, spec, graph.input("tokens", (batch, seq)))
        for layer in range(self.layers):
            x_BTE = self.cell.describe(graph.scope(f"layers.{layer}"), x_BTE, spec.width)
        return x_BTE


def describe_embedding(graph: GraphBuilder, spec: ModelSpec, tokens_BT: GraphTensor) -> GraphTensor:
    """Record the lookup of tokens in a table of the model's width, (B, T) → (B, T, E)."""
    found, parameters = (*tokens_BT.shape, spec.width), spec.vocab_size * spec.width
    return graph.add(
        "embedding",
        "embedding",
        tokens_BT,
        shape=found,
        role="embedding",
        parameters=parameters,
        saved_elements=tokens_BT.elements * spec.width,
    )


class Recurrent(OneSidedModel):
    """Cells one after the other."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        body = spec.body
        assert isinstance(body, RecurrentBody)
        self.embedding = Embedding(spec.vocab_size, spec.width)
        self.layers = nn.ModuleList(body.cell.build(spec.width, spec.width) for _ in range(body.layers))
        self.head = spec.head.build(spec, self.embedding)

    def hidden_states(self, given: ModelInput, cache: KVCache | None, attention: AttentionBackend | None) -> Tensor:
        """(B, T, E); every document begins with an empty state. Order is all a recurrence knows: positions are not read.
        Raises DataError for a cache."""
        if cache is not None:
            raise DataError("a recurrent body keeps no keys and values: it has no cache")
        x_BTE = self.embedding(given.tokens)
        is_input = torch.ones_like(given.tokens) if given.segments is None else (given.segments == 0).long()
        if given.mask is None and given.documents is None:
            return self.run(x_BTE, is_input.sum(-1))
        places, real = sequences(document_runs(given.mask, given.documents, given.tokens))
        y_NLE = self.run(x_BTE.flatten(0, 1)[places], (is_input.flatten()[places] * real).sum(-1))
        return torch.zeros_like(x_BTE).flatten(0, 1).index_put((places[real],), y_NLE[real]).view_as(x_BTE)

    def run(self, x_NLE: Tensor, inputs_N: Tensor) -> Tensor:
        """(N, L, E) → (N, L, E) through all layers; (N,) how many tokens are input."""
        for layer in self.layers:
            x_NLE = layer(x_NLE, inputs_N)
        return x_NLE


def document_runs(mask: Tensor | None, documents: Tensor | None, tokens: Tensor) -> Tensor:
    """(B, T): a number that changes where a document or a run of padding begins."""
    documents = torch.zeros_like(tokens) if documents is None else documents
    return documents if mask is None else torch.where(mask, documents, -1)
