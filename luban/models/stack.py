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
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.kernels.attention_mask import AttentionMask
from luban.models.arrangement.base import LayerParts
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
        norm: whether the residual is normalised at the end, where the last layer's arrangement asks for that.
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
    if (new := backend.begin(queries, mask)) is not None:
        real, key_positions = new.token_mask, new.key_positions
        positions = new.positions if positions is None else positions
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
        if layer.position is not None and layer.position.embeds:
            name = layer.position.registry.name_of(type(layer.position))
            raise ConfigError(
                f"layer {index} can't have {name} positions of its own: they are added to the token embeddings, which "
                "all layers share; make them the model's (model.position)"
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


def describe_stack(
    graph: GraphBuilder,
    spec: ModelSpec,
    layers: Sequence[LayerSpec],
    tokens_BT: GraphTensor,
    *,
    causal: bool,
    segments: int = 0,
    states_BSE: GraphTensor | None = None,
    shared_tokens: bool = False,
) -> GraphTensor:
    """Record embedding, layers and norm of a stack, (B, T) token ids → (B, T, E).

    Args:
        segments: rows of the table of segments.
        states_BSE: encoder states that the layers attend to.
        shared_tokens: the token table is another stack's.
    """
    shape = position_shape(spec, layers, causal=causal)
    x_BTE = _describe_embedding(graph, spec, tokens_BT, shape, segments=segments, shared_tokens=shared_tokens)
    seq = tokens_BT.shape[1]
    bias_of: dict[Position | None, GraphTensor | None] = {}
    for index, layer in enumerate(layers):
        if layer.position not in bias_of:
            own = layer.mixer.attention(spec.width)
            at = replace(shape, heads=own.heads, head_dim=own.head_dim) if own and layer.position else shape
            name = "position" if layer.position is None else f"layer_positions.{index}"
            bias_of[layer.position] = (layer.position or spec.position).describe_bias(graph.scope(name), seq, seq, at)
    for index, layer in enumerate(layers):
        place = LayerShape(spec.width, index, len(layers), causal)
        block = graph.scope(f"blocks.{index}", layer=True, shared=layer.share is not None)
        x_BTE = layer.arrangement.describe(LayerParts(block, layer, place, bias_of[layer.position], states_BSE), x_BTE)
    return layers[-1].norm.describe(graph, "norm", x_BTE) if layers[-1].arrangement.final_norm else x_BTE


def _describe_embedding(
    graph: GraphBuilder,
    spec: ModelSpec,
    tokens_BT: GraphTensor,
    shape: PositionShape,
    *,
    segments: int,
    shared_tokens: bool,
) -> GraphTensor:
    """Record what `InputEmbedding` does, (B, T) → (B, T, E)."""
    width, embedding = spec.body.embedding_width(spec), graph.scope("embedding")

    def look_up(name: str, ids_BT: GraphTensor, rows: int, saved: int = 0) -> GraphTensor:
        found = (*ids_BT.shape, width)
        return embedding.add(name, "embedding", ids_BT, shape=found, role="embedding", parameters=rows, saved=saved)

    x_BTW = look_up("tokens", tokens_BT, 0 if shared_tokens else spec.vocab_size * width, tokens_BT.elements * width)
    x_BTW = spec.position.describe_embedding(graph.scope("position"), x_BTW, shape)
    if segments:
        segments_BTW = look_up("segments", graph.input("segments", tokens_BT.shape), segments * width)
        x_BTW = embedding.residual("sum", x_BTW, segments_BTW)
    if spec.embedding_norm:
        x_BTW = spec.embedding_norm.describe(embedding, "norm", x_BTW)
    return embedding.linear("widen", x_BTW, spec.width, bias=True) if spec.body.widens_embeddings() else x_BTW
