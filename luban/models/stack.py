"""A stack of Transformer layers: decoders, encoders, both sides of encoder–decoders, and slices of them.

B batch, T new tokens, S tokens with those in the cache, E model width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.opgraph import Op, linear_op, within
from luban.kernels.attention_mask import AttentionMask
from luban.models.layer import LayerSpec
from luban.nn.attention.backend import AttentionBackend
from luban.nn.attention.prepared_mask import compute_dtype
from luban.nn.context import AttentionGroup, EncoderStates, ForwardContext
from luban.nn.embedding import Embedding, InputEmbedding
from luban.nn.mixer.base import LayerShape
from luban.nn.position.base import Position, PositionShape

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


class TransformerStack(nn.Module):
    """Embedding, layers, norm; a slice of a model has only some of them. Layers keep their numbers in the whole model.

    Args:
        layers: number → layer, of those that this stack holds.
        depth: layers of the whole stack.
        shape: what positions need to know.
        spec: of the model.
        embedding: token ids → (B, T, E); None: the input is hidden states.
        norm: whether the stream is normalised at the end, where the last layer's arrangement asks for that.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerSpec],
        *,
        depth: int,
        shape: PositionShape,
        spec: ModelSpec,
        embedding: InputEmbedding | None,
        norm: bool = True,
    ):
        super().__init__()
        self.embedding = embedding
        self.position = spec.position.build(shape)
        self.causal = shape.causal
        self.blocks = nn.ModuleDict()
        self.block_of: dict[int, str] = {}  # layer → its block, another's where parameters are shared
        self.layer_positions = nn.ModuleDict()
        methods: dict[Position | None, int] = {None: 0}
        groups: dict[AttentionGroup, int] = {}
        self.group_of: dict[int, int | None] = {}
        for index, layer in layers.items():
            owner = index if layer.share is None else layer.share
            if owner not in self.block_of:
                place = LayerShape(spec.width, index, depth, shape.causal)
                self.blocks[str(owner)] = layer.arrangement.build(layer, place)
            self.block_of[index] = str(owner)
            attends = layer.mixer.attention(spec.width)
            if layer.position is not None and layer.position not in methods:
                methods[layer.position] = len(methods)
                own = replace(shape, heads=attends.heads, head_dim=attends.head_dim) if attends else shape
                self.layer_positions[str(index)] = layer.position.build(own)
            group = None if attends is None else AttentionGroup(methods[layer.position], attends)
            self.group_of[index] = None if group is None else groups.setdefault(group, len(groups))
        self.groups = tuple(groups)
        last = layers[max(layers)]
        self.norm = last.norm.build(spec.width) if norm and last.arrangement.final_norm else None

    def forward(self, x: Tensor, ctx: ForwardContext, segments: Tensor | None = None) -> Tensor:
        """Token ids (B, T), or hidden states (B, T, E) where there is no embedding → (B, T, E)."""
        mapped = ctx.map_positions(self.position)
        if self.embedding is not None:
            x = self.embedding(x, self.position, mapped[0], segments)
        methods = [self.position, *self.layer_positions.values()]
        ctx.prepare(methods, mapped, self.groups, self.group_of, compute_dtype(x))
        for index, block in self.block_of.items():
            x = self.blocks[block](x, ctx.layer(index))
        return x if self.norm is None else self.norm(x)


def forward_context(
    stack: TransformerStack,
    tokens: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    backend: AttentionBackend,
    *,
    documents: Tensor | None = None,
    document_starts: Tensor | None = None,
    prefix: Tensor | None = None,
    encoder: EncoderStates | None = None,
) -> ForwardContext:
    """What the layers of a stack share in one forward; a cache gets slots for the new tokens.

    Args:
        tokens: (B, T). mask: (B, T) bool, true where real. positions: (B, T) or (1, T); None: counted.
        documents, document_starts: as in `OneSidedModel.forward`.
        prefix: (B, T) bool, keys that all queries of their document see.
        encoder: what decoder layers cross-attend to.
    """
    queries, counted, real = tokens.shape[1], positions is None, mask
    if backend.cached:
        cache = backend.cache  # type: ignore[attr-defined]
        from_cache = cache.begin(queries, mask)
        real, key_positions = cache.valid, cache.positions
        positions = from_cache if positions is None else positions
    else:
        positions = count_positions(tokens, mask, documents) if positions is None else positions
        key_positions = positions
    seen = AttentionMask(
        queries=queries,
        keys=key_positions.shape[-1],
        causal=stack.causal,
        device=tokens.device,
        token_mask=real,
        documents=documents,
        document_starts=document_starts,
        prefix=prefix,
    )
    return ForwardContext(
        backend=backend, mask=seen, positions=positions, key_positions=key_positions, counted=counted, encoder=encoder
    )


def count_positions(tokens: Tensor, mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """(1 or B, T) positions: real tokens counted from 0, starting again where the document changes."""
    slots = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if mask is not None:
        slots = (mask.long().cumsum(dim=-1) - 1).clamp_min(0)
    if documents is None:
        return slots
    fresh = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return slots - torch.where(fresh, slots, 0).cummax(dim=-1).values


def input_embedding(spec: ModelSpec, tokens: Embedding | None = None, *, segments: int = 0) -> InputEmbedding:
    """The embedding of a model; `tokens`: a token table that it shares."""
    width = spec.body.embedding_width(spec)
    tokens = Embedding(spec.vocab_size, width) if tokens is None else tokens
    return InputEmbedding(
        tokens, width, spec.width, segments=segments, norm=spec.embedding_norm, widen=spec.body.widens_embeddings()
    )


def position_shape(spec: ModelSpec, layers: Sequence[LayerSpec], *, causal: bool) -> PositionShape:
    """What the model's position method needs to know of a stack.

    Raises ConfigError where layers that use it have different heads.
    """
    shapes = {a[:1] + a[2:3] for layer in layers if layer.position is None and (a := layer.mixer.attention(spec.width))}
    if len(shapes) > 1:
        raise ConfigError(
            f"layers with {' and '.join(f'{h} heads of {d}' for h, d in sorted(shapes))} can't share the model's "
            "position method: give some of them a position of their own (model.pattern … position)"
        )
    heads, head_dim = next(iter(shapes), (1, spec.width))
    return PositionShape(
        width=spec.body.embedding_width(spec), heads=heads, head_dim=head_dim, context=spec.context, causal=causal
    )


def check_layers(spec: ModelSpec, layers: Sequence[LayerSpec], *, causal: bool, cross: bool = False) -> None:
    """Raise ConfigError where the layers of a stack don't fit each other or the model.

    Args:
        cross: whether the stack reads an encoder.
    """
    if not layers:
        raise ConfigError("a stack needs at least 1 layer: model.layers")
    for index, layer in enumerate(layers):
        layer.mixer.check(spec.width)
        layer.arrangement.check(layer)
        if layer.cross != cross:
            raise ConfigError(
                "layers with cross = true read an encoder: they are those of an encoder–decoder's decoder, all "
                "of them and no others"
            )
        if layer.share is not None:
            first = layers[layer.share] if layer.share < index else None
            if first is None or first.share is not None or replace(layer, share=None) != first:
                raise ConfigError(
                    f"layer {index} shares the parameters of layer {layer.share}: that must be an earlier layer "
                    "with the same parts and parameters of its own"
                )
    shape = position_shape(spec, layers, causal=causal)
    spec.position.check(shape)
    for layer in layers:
        if layer.position is not None and (own := layer.mixer.attention(spec.width)):
            layer.position.check(replace(shape, heads=own.heads, head_dim=own.head_dim))


def stack_ops(
    spec: ModelSpec,
    layers: Sequence[LayerSpec],
    batch: int,
    seq: int,
    *,
    causal: bool,
    segments: int = 0,
    source: int | None = None,
    shared_tokens: bool = False,
) -> list[Op]:
    """Embedding, layers (shared parameters counted once) and norm of a stack.

    Args:
        segments: rows of the table of segments. source: encoder tokens that the layers attend to.
        shared_tokens: the token table is another stack's.
    """
    tokens, width = batch * seq, spec.body.embedding_width(spec)
    shape = position_shape(spec, layers, causal=causal)
    ops = [
        Op(
            name="embedding.tokens",
            kind="embedding",
            activation=tokens * width,
            parameters=0 if shared_tokens else spec.vocab_size * width,
        )
    ]
    if learned := spec.position.parameters(shape):
        ops.append(Op(name="position", kind="embedding", parameters=learned))
    if segments:
        ops.append(Op(name="embedding.segments", kind="embedding", parameters=segments * width))
    if spec.embedding_norm:
        ops.append(spec.embedding_norm.op("embedding.norm", tokens, width))
    if spec.body.widens_embeddings():
        ops.append(linear_op("embedding.widen", tokens, width, spec.width, bias=True))
    for index, layer in enumerate(layers):
        place = LayerShape(spec.width, index, len(layers), causal)
        made = layer.arrangement.ops(layer, place, batch, seq, source)
        ops += within(f"blocks.{index}", made if layer.share is None else [replace(op, parameters=0) for op in made])
        if layer.position is not None and layer.position not in [other.position for other in layers[:index]]:
            own = layer.mixer.attention(spec.width)
            own_shape = replace(shape, heads=own.heads, head_dim=own.head_dim) if own else shape
            if learned := layer.position.parameters(own_shape):
                ops.append(Op(name=f"layer_positions.{index}", kind="embedding", parameters=learned))
    if layers[-1].arrangement.final_norm:
        ops.append(layers[-1].norm.op("norm", tokens, spec.width))
    return ops
