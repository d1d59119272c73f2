"""ELMo (Peters et al. 2018): LSTMs in both directions over words made of their characters.

B batch, T tokens, C characters a token, E width of one direction, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.protocols import KVCache
from luban.models.base import Body, ModelInput, OneSidedModel, refuse_transformer_fields
from luban.models.recurrent import describe_embedding, document_runs
from luban.nn.attention.backend import AttentionBackend
from luban.nn.character import CharacterCNN, CharacterWords
from luban.nn.embedding import Embedding
from luban.nn.recurrent.base import backwards, sequences
from luban.nn.recurrent.plain import LSTM
from luban.nn.roles import Role

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec

CHARACTERS = 50  # of a word, for counting operations


@dataclass(frozen=True, kw_only=True)
class ElmoBody(Body):
    """A forward and a backward stack that share words and head; a residual sum from the second layer on."""

    stacked = False
    fixed_shapes = False
    layers: int = 2  # of each direction
    cell: LSTM = field(default_factory=LSTM)  # of every layer and direction
    words: CharacterCNN | None = None  # words from characters: tokens are (B, T, C); none: a table of token ids

    def check(self, spec: ModelSpec) -> None:
        """Characters leave no table for the head to share, and no part of a Transformer is given."""
        refuse_transformer_fields(spec)
        if self.layers < 1:
            raise ConfigError(f"model.body.layers must be at least 1, {self.layers} given")
        if self.words is not None and spec.tied_head:
            raise ConfigError("a character model has no embedding table to tie the head to: set tied_head = false")

    def build(self, spec: ModelSpec) -> Elmo:
        """The module with its head."""
        return Elmo(spec)

    def describe(self, graph: GraphBuilder, spec: ModelSpec, batch: int, seq: int, target: int | None) -> GraphTensor:
        """Words and both stacks; the top states of both directions, (B, T, 2, E)."""
        if self.words is None:
            words_BTE = describe_embedding(graph, spec, graph.input("tokens", (batch, seq)))
        else:
            characters_BTC = graph.input("tokens", (batch, seq, CHARACTERS))
            words_BTE = self.words.describe(graph.scope("embedding"), characters_BTC, spec.width)
        tops = {"forwards": words_BTE, "backwards": words_BTE}
        for layer in range(self.layers):
            for side, below_BTE in tops.items():
                above_BTE = self.cell.describe(graph.scope(f"{side}.{layer}"), below_BTE, spec.width)
                tops[side] = graph.residual(f"{side}_residual_{layer}", above_BTE, below_BTE) if layer else above_BTE
        return graph.add("states", "concat", *tops.values(), shape=(batch, seq, 2, spec.width))


class Elmo(OneSidedModel):
    """Words, and a stack of LSTMs in each direction."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        body = spec.body
        assert isinstance(body, ElmoBody)
        words = body.words
        self.embedding = Embedding(spec.vocab_size, spec.width) if words is None else CharacterWords(words, spec.width)
        self.forwards = nn.ModuleList(body.cell.build(spec.width, spec.width) for _ in range(body.layers))
        self.backwards = nn.ModuleList(body.cell.build(spec.width, spec.width) for _ in range(body.layers))
        self.head = spec.head.build(spec, self.embedding)

    def hidden_states(self, given: ModelInput, cache: KVCache | None, attention: AttentionBackend | None) -> Tensor:
        """(B, T, 2, E), the top states of both directions: their logits (B, T, 2, V) predict the token after each from
        those up to it, and the one before it from those behind. Order is all that is known: positions and segments are
        not read. Raises DataError for a cache."""
        if cache is not None:
            raise DataError("a bidirectional model can't generate token by token")
        return self.representations(given.tokens, given.mask, documents=given.documents)[-1].unflatten(-1, (2, -1))

    def representations(
        self, tokens: Tensor, mask: Tensor | None = None, *, documents: Tensor | None = None
    ) -> list[Tensor]:
        """The layers + 1 representations (B, T, 2E) that a task mixes: words (twice), then both directions together."""
        x_BTE = self.embedding(tokens)
        places, real = sequences(document_runs(mask, documents, tokens[:, :, 0] if tokens.dim() == 3 else tokens))
        forth = x_BTE.flatten(0, 1)[places]
        back, given = backwards(forth, real), real.sum(-1)
        found = [torch.cat((x_BTE, x_BTE), dim=-1)]
        for depth, (one, two) in enumerate(zip(self.forwards, self.backwards, strict=True)):
            forth = one(forth, given) + (forth if depth else 0)
            back = two(back, given) + (back if depth else 0)
            both = torch.cat((forth, backwards(back, real)), dim=-1)
            out = both.new_zeros(x_BTE.shape[0] * x_BTE.shape[1], both.shape[-1])
            found.append(out.index_put((places[real],), both[real]).unflatten(0, x_BTE.shape[:2]))
        return found


class Mix(nn.Module):
    """γ Σ_j s_j h_j, with s a softmax over the layers (equation 1)."""

    parameter_roles: ClassVar[dict[str, Role]] = {"scores": "bias", "scale": "bias"}

    def __init__(self, layers: int):
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(layers))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, layers: list[Tensor]) -> Tensor:
        """The `layers` representations (B, T, 2E) → (B, T, 2E)."""
        return self.scale * torch.einsum("j,j...->...", self.scores.softmax(-1), torch.stack(layers))
