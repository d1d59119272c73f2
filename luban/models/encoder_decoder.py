"""The encoder–decoder (the original Transformer, BART, T5).

B batch, S source tokens, T decoder tokens, E model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError, DataError
from luban.core.opgraph import Op, within
from luban.core.protocols import KVCache
from luban.kernels.visible import Visible
from luban.models.block.cross import Memory, cross_block, cross_ops, require_cross
from luban.models.body import Body, BodyModule
from luban.models.decoder import count_positions
from luban.nn.attention.family import Limits
from luban.nn.attention.mask import Places, Scores, compute_dtype, frames
from luban.nn.position.family import PositionShape

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderBody(Body):
    """An encoder over the source and a decoder over the target, with one embedding table for both."""

    encoder_layers: int | None = None  # blocks of the encoder; none: as many as the decoder's
    decoder_start: int | None = None  # id of the token that the decoder begins with; none: it can't write text
    decoder_second: int | None = None  # id of the token that always follows it (forced begin); none: it is predicted

    def check(self, spec: ModelSpec) -> None:
        """Parts that have a form with cross-attention."""
        super().check(spec)
        for side in self.sides(spec):
            spec.position.check(side)
        require_cross(spec)
        if self.encoder_layers is not None and self.encoder_layers < 1:
            raise ConfigError(f"encoder_layers must be at least 1, {self.encoder_layers} given")
        for name in ("decoder_start", "decoder_second"):
            if (token := getattr(self, name)) is not None and not 0 <= token < spec.vocab_size:
                raise ConfigError(f"{name} must be a token id below {spec.vocab_size}, {token} given")
        if spec.attention.window is not None or spec.attention.layout is not None:
            raise ConfigError("attention windows and layouts aren't built for encoder–decoders")

    def sides(self, spec: ModelSpec) -> tuple[PositionShape, PositionShape]:
        """What positions need to know of the encoder, which sees both ways, and of the decoder."""
        return replace(spec.position_shape, causal=False), spec.position_shape

    def build(self, spec: ModelSpec) -> EncoderDecoder:
        """The module with its head."""
        return EncoderDecoder(spec)

    def ops(self, spec: ModelSpec, batch: int, seq: int, target: int | None = None) -> list[Op]:
        """`seq` tokens on the encoder's side and `target` on the decoder's; none: as many."""
        target = seq if target is None else target
        tokens = batch * (seq + target)
        ops = [Op(name="embedding", kind="embedding", parameters=spec.vocab_size * spec.width,
                  activation=tokens * spec.width)]  # fmt: skip
        layers = (self.encoder_layers or spec.layers, spec.layers)
        blocks = (spec.block.ops(spec, batch, seq), cross_ops(spec, batch, target, seq))
        sides = zip(("encoder", "decoder"), self.sides(spec), layers, blocks, (seq, target), strict=True)
        for side, shape, count, block, length in sides:
            if learned := spec.position.parameters(shape):
                ops.append(Op(name=f"{side}.position", kind="embedding", parameters=learned))
            if spec.embedding_norm:
                ops.append(spec.embedding_norm.op(f"{side}.embedding_norm", batch * length, spec.width))
            for layer in range(count):
                ops += within(f"{side}.blocks.{layer}", block)
            if spec.block.final_norm:
                ops.append(spec.norm.op(f"{side}.norm", batch * length, spec.width))
        return ops


class Side(nn.Module):
    """Positions, blocks and norms of the encoder or of the decoder."""

    def __init__(self, spec: ModelSpec, shape: PositionShape, blocks: list[nn.Module]):
        super().__init__()
        self.position = spec.position.build(shape)
        self.embedding_norm = spec.embedding_norm.build(spec.width) if spec.embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.norm = spec.norm.build(spec.width) if spec.block.final_norm else nn.Identity()
        self.causal, self.heads, self.head_dim = shape.causal, shape.heads, shape.head_dim

    def forward(self, x_BTE: Tensor, mask: Tensor | None, positions: Tensor | None, cache: KVCache | None,
                memory: tuple[Memory, ...]) -> Tensor:  # fmt: skip
        """Embedded tokens (B, T, E) → (B, T, E)."""
        queries, real, given = x_BTE.shape[1], mask, positions is not None
        if cache is None:
            positions = count_positions(x_BTE[..., 0], mask, None) if positions is None else positions
            key_positions = positions
        else:
            counted = cache.begin(queries, mask)
            real, key_positions = cache.valid, cache.positions
            positions = counted if positions is None else positions
        positions, key_positions = self.position.place(positions, key_positions, cached=cache is not None)
        x_BTE = self.embedding_norm(self.position.embed(x_BTE, positions))
        visible = Visible(
            queries=queries, keys=key_positions.shape[-1], causal=self.causal, device=x_BTE.device, real=real
        )
        places = Places(positions, key_positions, not given)
        everything = Limits()
        frame = frames([everything], visible, self.position, places, heads=self.heads, width=self.head_dim,
                       dtype=compute_dtype(x_BTE), cache=cache)[everything]  # fmt: skip
        for layer, block in enumerate(self.blocks):
            x_BTE = block(x_BTE, frame, self.position, layer, *memory)
        return self.norm(x_BTE)


class EncoderDecoder(BodyModule):
    """One embedding, two sides, a head on the decoder's. Its parameters are its only state."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        body = spec.body
        assert isinstance(body, EncoderDecoderBody)
        of_encoder, of_decoder = body.sides(spec)
        self.embedding = nn.Embedding(spec.vocab_size, spec.width)
        self.encoder = Side(
            spec, of_encoder, [spec.block.build(spec) for _ in range(body.encoder_layers or spec.layers)]
        )
        self.decoder = Side(spec, of_decoder, [cross_block(spec) for _ in range(spec.layers)])
        self.readout = spec.head.build(spec)

    def encode(self, tokens: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Memory:
        """(B, S) source tokens, `mask` (B, S) true where real → what the decoder's layers look at."""
        states_BSE = self.encoder(self.embedding(tokens), mask, positions, None, ())
        scores = Scores()
        if mask is not None:  # a row of padding alone sees itself, so that no score row is empty
            seen = mask | ~mask.any(-1, keepdim=True)
            hidden = torch.where(seen[:, None, None, :], 0.0, float("-inf")).to(compute_dtype(states_BSE))
            scores = Scores(mask=hidden)
        return Memory([block.cross.remember(states_BSE) for block in self.decoder.blocks], scores)

    def forward(self, tokens: Tensor | None, decoder_tokens: Tensor, mask: Tensor | None = None, *,
                decoder_mask: Tensor | None = None, documents: None = None, positions: Tensor | None = None,
                segments: None = None, cache: KVCache | None = None, memory: Memory | None = None,
                output: Literal["logits", "hidden"] = "logits") -> Tensor:  # fmt: skip
        """Logits of the next target token at every place of the decoder, or its hidden states.

        Args:
            tokens: (B, S) int64, the source; not read where `memory` is given.
            decoder_tokens: (B, T) int64, the target so far; with a cache only its new tokens.
            mask: (B, S) bool, true where a source token is real.
            decoder_mask: (B, T) bool, the same of the target.
            documents, segments: none: every row is one source and one target. DataError otherwise.
            positions: (B, T) or (1, T) of the decoder; default: real tokens counted from 0.
            cache: keys and values of the decoder's earlier tokens.
            memory: what `encode` made of the source, to decode step by step.

        Returns:
            (B, T, V) logits or (B, T, E) hidden states.
        """
        if documents is not None or segments is not None:
            raise DataError(
                "an encoder–decoder reads one source and one target a row: it takes no documents or segments"
            )
        memory = self.encode(tokens, mask) if memory is None else memory
        hidden = self.decoder(self.embedding(decoder_tokens), decoder_mask, positions, cache, (memory,))
        return hidden if output == "hidden" else self.head(hidden, decoder_mask)
