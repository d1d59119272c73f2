"""The causal decoder.

B batch, T new tokens, S tokens with those in the cache, E model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import DataError
from luban.core.opgraph import Op, masked, within
from luban.core.protocols import KVCache
from luban.kernels.visible import Visible
from luban.models.body import Body, BodyModule
from luban.nn.attention.mask import Places, compute_dtype, frames

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class DecoderBody(Body):
    """Blocks in which a token sees itself and those before it."""

    causal = True
    cached = True

    def build(self, spec: ModelSpec) -> Decoder:
        """The module with its head."""
        return Decoder(spec)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """Embeddings, blocks, the norm at the end."""
        tokens = batch * seq
        ops = [Op(name="embedding", kind="embedding", parameters=spec.vocab_size * spec.width,
                  activation=tokens * spec.width)]  # fmt: skip
        if learned := spec.position.parameters(spec.position_shape):
            ops.append(Op(name="position", kind="embedding", parameters=learned))
        if spec.embedding_norm:
            ops.append(spec.embedding_norm.op("embedding_norm", tokens, spec.width))
        block = spec.block.ops(spec, batch, seq)
        for layer in range(spec.layers):
            share = spec.attention.seen_share(layer, seq, causal=True)
            ops += within(f"blocks.{layer}", masked(block, share))
        if spec.block.final_norm:
            ops.append(spec.norm.op("norm", tokens, spec.width))
        return ops


class Decoder(BodyModule):
    """Embedding, blocks, final norm, head. Its parameters are its only state."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        self.embedding = nn.Embedding(spec.vocab_size, spec.width)
        self.position = spec.position.build(spec.position_shape)
        self.embedding_norm = spec.embedding_norm.build(spec.width) if spec.embedding_norm else None
        self.blocks = nn.ModuleList(spec.block.build(spec) for _ in range(spec.layers))
        self.limits_of = [spec.attention.limits_of(layer) for layer in range(spec.layers)]
        self.limits = tuple(dict.fromkeys(self.limits_of))
        self.heads, self.head_dim = spec.attention.heads, spec.attention.head_width(spec.width)
        self.norm = spec.norm.build(spec.width) if spec.block.final_norm else nn.Identity()
        self.readout = spec.head.build(spec)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, *, documents: Tensor | None = None,
                positions: Tensor | None = None, segments: Tensor | None = None, cache: KVCache | None = None,
                starts: Tensor | None = None, output: Literal["logits", "hidden"] = "logits") -> Tensor:  # fmt: skip
        """Logits of the next token at every place, or the hidden states that `head` turns into them.

        Args:
            tokens: (B, T) int64.
            mask: (B, T) bool, true where a token is real (padding may be left or right).
            documents: (B, T) int; attention stays inside one document. Not together with a cache.
            positions: (B, T) or (1, T) int; default: real tokens counted from 0, in each document. With a bias of
                distances fused kernels need them to rise by one from token to token, as those do, and give NaN
                where they don't.
            segments: (B, T) int; tokens of segment 0 are a prefix that every token of their document sees (prefix LM,
                blank infilling). With a cache they are for the first forward alone, and not for models with windows,
                whose later steps would lose sight of the prefix.
            cache: keys and values of earlier tokens; it takes up the new ones.
            starts: (B, C) int32, the slots at which the runs of `documents` begin, each row filled up with T
                (`Batch.starts`). It says nothing that they don't, and nobody checks that it agrees with them; but it
                spares kernels that go from document to document a question to the device.

        Returns:
            (B, T, V) logits or (B, T, E) hidden states. Those at padding mean nothing.

        Raises:
            DataError: documents or segments that can't go with the cache, or segments with a block-sparse layout.
        """
        queries, counted = tokens.shape[1], positions is None
        if segments is not None and any(limits.layout for limits in self.limits):
            raise DataError("a block-sparse layout knows no prefix that all tokens see: leave out segments, or "
                            "attention.layout")  # fmt: skip
        if cache is not None:
            self._check_cached(cache, documents, segments)
            from_cache = cache.begin(queries, mask)
            real, key_positions = cache.valid, cache.positions
            positions = from_cache if positions is None else positions
        else:
            positions = count_positions(tokens, mask, documents) if positions is None else positions
            real, key_positions = mask, positions
        positions, key_positions = self.position.place(positions, key_positions, cached=cache is not None)
        x_BTE = self.position.embed(self.embedding(tokens), positions)
        if self.embedding_norm is not None:
            x_BTE = self.embedding_norm(x_BTE)
        visible = Visible(queries=queries, keys=key_positions.shape[-1], causal=True, device=tokens.device, real=real,
                          documents=documents, starts=starts, prefix=None if segments is None else segments == 0)  # fmt: skip
        frame_of = frames(self.limits, visible, self.position, Places(positions, key_positions, counted),
                          heads=self.heads, width=self.head_dim, dtype=compute_dtype(x_BTE), cache=cache)  # fmt: skip
        for layer, block in enumerate(self.blocks):
            x_BTE = block(x_BTE, frame_of[self.limits_of[layer]], self.position, layer)
        hidden = self.norm(x_BTE)
        return hidden if output == "hidden" else self.head(hidden, mask)

    def _check_cached(self, cache: KVCache, documents: Tensor | None, segments: Tensor | None) -> None:
        if documents is not None:
            raise DataError("a cache holds one document a row: leave out documents, or leave out the cache")
        if segments is not None and cache.positions.shape[-1]:
            raise DataError("segments are for the first forward of a cache: what follows sees the prefix anyway")
        if segments is not None and any(limits.window is not None for limits in self.limits):
            raise DataError("a model with attention windows can't continue a prefix with a cache, since later "
                            "tokens would no longer see it: leave out the cache")  # fmt: skip


def count_positions(tokens: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """(1 or B, T) positions: real tokens counted from 0, starting again where the document changes."""
    slots = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if mask is not None:
        slots = (mask.long().cumsum(dim=-1) - 1).clamp_min(0)
    if documents is None:
        return slots
    fresh = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return slots - torch.where(fresh, slots, 0).cummax(dim=-1).values
