"""The bidirectional encoder (BERT, RoBERTa, ALBERT).

B batch, T tokens, E model width, W width of the embedding table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.core.opgraph import Op, linear_op, masked, within
from luban.kernels.visible import Visible
from luban.models.body import Body, BodyModule
from luban.models.decoder import count_positions
from luban.nn.attention.mask import Places, compute_dtype, frames
from luban.nn.position.family import PositionShape

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class EncoderBody(Body):
    """Blocks in which every token sees every other; narrower embeddings are widened."""

    segments: int = 0  # rows of a table that tells segments apart (BERT: 2; 0: no table)
    embedding_width: int | None = None  # W, with a dense layer to E behind it (Lan et al. 2020); none: E, no layer
    groups: int | None = None  # different blocks; each serves layers / groups layers in a row (ALBERT: 1); none: all

    def check(self, spec: ModelSpec) -> None:
        """Groups divide the layers; the rest as in every body."""
        if self.segments < 0 or (self.embedding_width is not None and self.embedding_width < 1):
            raise ConfigError("segments must be at least 0 and embedding_width at least 1")
        if self.groups is not None and (self.groups < 1 or spec.layers % self.groups):
            raise ConfigError(f"{spec.layers} layers can't be shared out over {self.groups} groups evenly")
        spec.attention.check(spec.width)
        spec.position.check(self.position_shape(spec))

    def table_width(self, spec: ModelSpec) -> int:
        """W."""
        return spec.width if self.embedding_width is None else self.embedding_width

    def position_shape(self, spec: ModelSpec) -> PositionShape:
        """Positions are added at the width of the embeddings, and tokens see both ways."""
        return replace(spec.position_shape, width=self.table_width(spec), causal=False)

    def build(self, spec: ModelSpec) -> Encoder:
        """The module with its head."""
        return Encoder(spec)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """Embeddings, blocks (shared parameters counted once), the norm at the end."""
        tokens, table = batch * seq, self.table_width(spec)
        ops = [Op(name="embedding", kind="embedding", parameters=spec.vocab_size * table, activation=tokens * table)]
        if learned := spec.position.parameters(self.position_shape(spec)):
            ops.append(Op(name="position", kind="embedding", parameters=learned))
        if self.segments:
            ops.append(Op(name="segments", kind="embedding", parameters=self.segments * table))
        if spec.embedding_norm:
            ops.append(spec.embedding_norm.op("embedding_norm", tokens, table))
        if self.embedding_width is not None:
            ops.append(linear_op("widen", tokens, table, spec.width, bias=True))
        block = spec.block.ops(spec, batch, seq)
        shared = [replace(op, parameters=0) for op in block]
        each = spec.layers // (self.groups or spec.layers)
        for layer in range(spec.layers):
            share = spec.attention.seen_share(layer, seq, causal=False)
            ops += within(f"blocks.{layer}", masked(shared if layer % each else block, share))
        if spec.block.final_norm:
            ops.append(spec.norm.op("norm", tokens, spec.width))
        return ops


class Encoder(BodyModule):
    """Embeddings, blocks, head. Its parameters are its only state."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        body = spec.body
        assert isinstance(body, EncoderBody)
        table = body.table_width(spec)
        self.embedding = nn.Embedding(spec.vocab_size, table)
        self.position = spec.position.build(body.position_shape(spec))
        self.segments = nn.Embedding(body.segments, table) if body.segments else None
        self.embedding_norm = spec.embedding_norm.build(table) if spec.embedding_norm else nn.Identity()
        self.widen = nn.Identity() if body.embedding_width is None else nn.Linear(table, spec.width)
        self.blocks = nn.ModuleList(spec.block.build(spec) for _ in range(body.groups or spec.layers))
        self.norm = spec.norm.build(spec.width) if spec.block.final_norm else nn.Identity()
        self.readout = spec.head.build(spec)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, *, documents: Tensor | None = None,
                positions: Tensor | None = None, segments: Tensor | None = None, cache: None = None,
                starts: Tensor | None = None, output: Literal["logits", "hidden"] = "logits") -> Tensor:  # fmt: skip
        """What the head makes of every place, or the hidden states that `head` reads.

        Args:
            tokens: (B, T) int64.
            mask: (B, T) bool, true where a token is real (padding may be left or right).
            documents: (B, T) int; attention stays inside one document.
            positions: (B, T) or (1, T) int; default: real tokens counted from 0, in each document.
            segments: (B, T) int, rows of the segment table; default: 0 everywhere.
            cache: none: every token sees later ones, so nothing can be kept. DataError if there is one.
            starts: not used: no kernel for whole documents needs it.

        Returns:
            (B, T, V) for a masked-LM head, or (B, T, E) hidden states. Those at padding mean nothing.
        """
        if cache is not None:
            raise DataError("an encoder can't generate token by token: every token sees those after it")
        counted = positions is None
        positions = count_positions(tokens, mask, documents) if counted else positions
        positions, _ = self.position.place(positions, positions, cached=False)
        x_BTE = self.position.embed(self.embedding(tokens), positions)
        if self.segments is not None:
            x_BTE = x_BTE + (self.segments.weight[0] if segments is None else self.segments(segments))
        elif segments is not None:
            raise DataError("this encoder has no segment table: build it with body.segments = 2")
        x_BTE = self.widen(self.embedding_norm(x_BTE))
        visible = Visible(queries=tokens.shape[1], keys=tokens.shape[1], causal=False, device=tokens.device, real=mask,
                          documents=documents)  # fmt: skip
        attention = self.spec.attention
        limits_of = [attention.limits_of(layer) for layer in range(self.spec.layers)]
        frame_of = frames(dict.fromkeys(limits_of), visible, self.position, Places(positions, positions, counted),
                          heads=attention.heads, width=attention.head_width(self.spec.width), dtype=compute_dtype(x_BTE))  # fmt: skip
        each = self.spec.layers // len(self.blocks)
        for layer, limits in enumerate(limits_of):
            x_BTE = self.blocks[layer // each](x_BTE, frame_of[limits], self.position, layer)
        hidden = self.norm(x_BTE)
        return hidden if output == "hidden" else self.head(hidden, mask)

    def pairs(self, hidden_BTE: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E) hidden states → (B, 2): the second output of a masked-LM head with `pair`."""
        return self.readout.pairs(hidden_BTE, mask)
