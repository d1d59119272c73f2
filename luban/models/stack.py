"""A stack of Transformer layers: decoders, encoders, both sides of encoder–decoders, and slices of them.

B batch, T new tokens, S tokens with those in the cache, E model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.protocols import KeysValues
from luban.kernels.attention_mask import AttentionMask
from luban.models.arrangement.base import LayerParts
from luban.models.layer import LayerSpec
from luban.nn.attention.backend import AttentionBackend
from luban.nn.attention.prepared_mask import compute_dtype
from luban.nn.context import AttentionGroup, EncoderStates, ForwardContext, LayerContext, RouterTraining
from luban.nn.embedding import Embedding, InputEmbedding
from luban.nn.mixer.base import LayerShape
from luban.nn.position.base import Position, PositionShape

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


class LayersPolicy(Protocol):
    """How consecutive layers run, and what they save for the backward pass."""

    def run(self, blocks: Sequence[tuple[nn.Module, LayerContext]], x_BTE: Tensor) -> Tensor:
        """(B, T, E) → (B, T, E) through the blocks, gradients enabled."""
        ...


class Layers(nn.ModuleDict):
    """The blocks of a stack by the first layer that uses each. The layers are run here, apart from what stands before and
    behind them, so that hooks can divide the tokens among processes and take the hidden states from another process."""

    remat: LayersPolicy | None = None

    def forward(self, x_BTE: Tensor, ctx: ForwardContext, block_of: Mapping[int, str]) -> Tensor:
        """(B, T, E) → (B, T, E) through the layers; `block_of`: layer index → key of its block."""
        return self.run(x_BTE, ctx, block_of, block_of)

    def run(self, x_BTE: Tensor, ctx: ForwardContext, block_of: Mapping[int, str], layers: Iterable[int]) -> Tensor:
        """The same through some of the layers."""
        blocks = [(self[block_of[index]], ctx.layer(index)) for index in layers]
        if self.remat is not None and blocks and torch.is_grad_enabled():
            return self.remat.run(blocks, x_BTE)
        for block, layer in blocks:
            x_BTE = block(x_BTE, layer)
        return x_BTE

    def use_remat(self, remat: LayersPolicy | None) -> None:
        """Run by `remat` where gradients are enabled; None: save everything that the blocks save."""
        self.remat = remat


class TransformerStack(nn.Module):
    """Embedding, layers, final norm; a pipeline slice has only some of them. Layers are numbered as in the whole model,
    also in a pipeline slice.

    Args:
        layers: layer index → layer, of those in this stack.
        depth: number of layers of the whole model's stack.
        shape: sizes for the position method.
        spec: of the model.
        embedding: token ids → (B, T, E); None: the input is hidden states.
        norm: apply the final norm, if the last layer's arrangement has one.
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
        self.blocks = Layers()
        self.block_of: dict[int, str] = {}  # layer index → key in `blocks`; shared layers map to the first one's
        self.layer_positions = nn.ModuleDict()
        methods: dict[tuple[Position, int, int] | None, int] = {None: 0}
        groups: dict[AttentionGroup, int] = {}
        self.group_of: dict[int, int | None] = {}
        for index, layer in layers.items():
            owner = index if layer.share is None else layer.share
            if owner not in self.block_of:
                layer_shape = LayerShape(spec.width, index, depth, shape.causal)
                self.blocks[str(owner)] = layer.arrangement.build(layer, layer_shape)
            self.block_of[index] = str(owner)
            method = None
            if layer.position is not None:
                own = _layer_position_shape(spec, layer, shape)
                method = (layer.position, own.heads, own.head_dim)
                if method not in methods:
                    methods[method] = len(methods)
                    self.layer_positions[str(index)] = layer.position.build(own)
            attention = layer.mixer.attention(spec.width)
            group = None if attention is None else AttentionGroup(methods[method], attention)
            self.group_of[index] = None if group is None else groups.setdefault(group, len(groups))
        self.groups = tuple(groups)
        last = layers[max(layers)]
        self.norm = last.norm.build(spec.width) if norm and last.arrangement.final_norm else None

    def forward(self, x: Tensor, ctx: ForwardContext, segments: Tensor | None = None) -> Tensor:
        """Token ids (B, T), or hidden states (B, T, E) if there is no embedding → (B, T, E).

        Args:
            segments: (B, T) segment ids, for an embedding that has them.
        """
        mapped = ctx.map_positions(self.position)
        if self.embedding is not None:
            x = self.embedding(x, self.position, mapped[0], segments)
        methods = [self.position, *self.layer_positions.values()]
        ctx.prepare(methods, mapped, self.groups, self.group_of, compute_dtype(x))
        x = self.blocks(x, ctx, self.block_of)
        return x if self.norm is None else self.norm(x)


def forward_context(
    stack: TransformerStack,
    tokens: Tensor,
    token_mask: Tensor | None,
    positions: Tensor | None,
    backend: AttentionBackend,
    *,
    documents: Tensor | None = None,
    document_starts: Tensor | None = None,
    prefix: Tensor | None = None,
    encoder: EncoderStates | None = None,
    routing: RouterTraining | None = None,
    prefixes: Mapping[int, KeysValues] | None = None,
) -> ForwardContext:
    """Build the ForwardContext; with a cache, also reserves slots for the new tokens.

    Args:
        tokens: (B, T) ids.
        token_mask: (B, T) bool, false where padding; None: no padding.
        positions: (B, T) or (1, T); None: computed here (`count_positions`).
        documents, document_starts: as in `OneSidedModel.forward`.
        prefix: (B, T) bool, True where a key is visible to every query of its document.
        encoder: the states that decoder layers cross-attend to.
        routing: what routers of experts need in training.
        prefixes: layer → keys and values (1, K, P, D) of P tokens before every text, whose positions begin at P.
    """
    queries, consecutive, key_mask = tokens.shape[1], positions is None, token_mask
    query_positions: Tensor
    if (new := backend.begin(queries, token_mask, positions)) is not None:
        query_positions, key_positions, key_mask = new
    else:
        query_positions = count_positions(tokens, token_mask, documents) if positions is None else positions
        key_positions = query_positions
    if prefixes:
        first = next(iter(prefixes.values()))[0].shape[2]
        query_positions, key_positions = query_positions + first, key_positions + first
    mask = AttentionMask(
        queries=queries,
        keys=key_positions.shape[-1],
        causal=stack.causal,
        device=tokens.device,
        token_mask=key_mask,
        documents=documents,
        document_starts=document_starts,
        prefix=prefix,
    )
    return ForwardContext(
        backend=backend,
        mask=mask,
        positions=query_positions,
        key_positions=key_positions,
        consecutive=consecutive,
        encoder=encoder,
        routing=routing,
        prefixes=prefixes,
    )


def count_positions(tokens: Tensor, token_mask: Tensor | None, documents: Tensor | None) -> Tensor:
    """Positions (1 or B, T) of tokens (B, T): from 0 in each document, padding not counted.

    Args:
        token_mask: (B, T) bool, false where padding; None: no padding.
        documents: (B, T) int, a document ends where the number changes; None: one document a row.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)[None]
    if token_mask is not None:
        index = (token_mask.long().cumsum(dim=-1) - 1).clamp_min(0)
    if documents is None:
        return index
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=-1).values


def input_embedding(spec: ModelSpec, tokens: Embedding | None = None, *, segments: int = 0) -> InputEmbedding:
    """The embedding of a model.

    Args:
        tokens: embedding to share; None: a new one.
        segments: number of segment ids.
    """
    width = spec.body.embedding_width(spec)
    tokens = Embedding(spec.vocab_size, width) if tokens is None else tokens
    return InputEmbedding(
        tokens, width, spec.width, segments=segments, norm=spec.embedding_norm, widen=spec.body.widens_embeddings()
    )


def position_shape(spec: ModelSpec, layers: Sequence[LayerSpec], *, causal: bool) -> PositionShape:
    """Sizes for the model's position method. Raises ConfigError if the layers that use it differ in heads or head dim."""
    shapes = {a[:1] + a[2:3] for layer in layers if layer.position is None and (a := layer.mixer.attention(spec.width))}
    if len(shapes) > 1:
        raise ConfigError(
            f"layers with {' and '.join(f'{h} heads of {d}' for h, d in sorted(shapes))} can't share the model's "
            "position method: give some of them a position method of their own (model.pattern … position)"
        )
    heads, head_dim = next(iter(shapes), (1, spec.width))
    return PositionShape(
        width=spec.body.embedding_width(spec), heads=heads, head_dim=head_dim, context=spec.context, causal=causal
    )


def _layer_position_shape(spec: ModelSpec, layer: LayerSpec, shape: PositionShape) -> PositionShape:
    """Sizes for the position method of one layer: the stack's `shape` with the layer's own heads."""
    attention = layer.mixer.attention(spec.width)
    return shape if attention is None else replace(shape, heads=attention.heads, head_dim=attention.head_dim)


def check_layers(spec: ModelSpec, layers: Sequence[LayerSpec], *, causal: bool, cross: bool = False) -> None:
    """Raise ConfigError if the layers of a stack don't fit each other or the model.

    Args:
        cross: the stack cross-attends to an encoder.
    """
    if not layers:
        raise ConfigError("a stack needs at least 1 layer: model.layers")
    for index, layer in enumerate(layers):
        layer.mixer.check(spec.width)
        layer.arrangement.check(layer)
        if layer.cross != cross:
            raise ConfigError(
                "cross = true is only for the decoder of an encoder–decoder, where all layers must have it"
            )
        if layer.position is not None and layer.position.embeds:
            name = layer.position.registry.name_of(type(layer.position))
            raise ConfigError(
                f"layer {index} can't have {name} positions of its own, because they are added to the token embeddings: "
                "set them for the whole model (model.position)"
            )
        if layer.share is not None:
            first = layers[layer.share] if layer.share < index else None
            if first is None or first.share is not None or replace(layer, share=None) != first:
                raise ConfigError(
                    f"layer {index} shares the parameters of layer {layer.share}, which must be an earlier layer with the "
                    "same settings that doesn't itself share another's"
                )
    shape = position_shape(spec, layers, causal=causal)
    spec.position.check(shape)
    for layer in layers:
        if layer.position is not None and layer.mixer.attention(spec.width):
            layer.position.check(_layer_position_shape(spec, layer, shape))


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
    """Record embedding, layers and final norm of a stack, (B, T) token ids → (B, T, E).

    Args:
        segments: number of segment ids.
        states_BSE: encoder states that the layers cross-attend to.
        shared_tokens: the embedding is shared with another stack.
    """
    shape = position_shape(spec, layers, causal=causal)
    x_BTE = _describe_embedding(graph, spec, tokens_BT, shape, segments=segments, shared_tokens=shared_tokens)
    seq = tokens_BT.shape[1]
    bias_of: dict[tuple[Position, int, int] | None, GraphTensor | None] = {}
    biases: list[GraphTensor | None] = []
    for index, layer in enumerate(layers):
        name, position, sizes, method = "position", spec.position, shape, None
        if layer.position is not None:
            name, position = f"layer_positions.{index}", layer.position
            sizes = _layer_position_shape(spec, layer, shape)
            method = (position, sizes.heads, sizes.head_dim)
        if method not in bias_of:
            bias_of[method] = position.describe_bias(graph.scope(name), seq, seq, sizes)
        biases.append(bias_of[method])
    for index, layer in enumerate(layers):
        layer_shape = LayerShape(spec.width, index, len(layers), causal)
        block = graph.scope(f"blocks.{index}", layer=True, shared=layer.share is not None)
        x_BTE = layer.arrangement.describe(LayerParts(block, layer, layer_shape, biases[index], states_BSE), x_BTE)
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

    def look_up(name: str, ids_BT: GraphTensor, parameters: int, saved: int = 0) -> GraphTensor:
        return embedding.add(
            name,
            "embedding",
            ids_BT,
            shape=(*ids_BT.shape, width),
            role="embedding",
            parameters=parameters,
            saved_elements=saved,
        )

    x_BTW = look_up("tokens", tokens_BT, 0 if shared_tokens else spec.vocab_size * width, tokens_BT.elements * width)
    x_BTW = spec.position.describe_embedding(graph.scope("position"), x_BTW, shape)
    if segments:
        segments_BTW = look_up("segments", graph.input("segments", tokens_BT.shape), segments * width)
        x_BTW = embedding.residual("sum", x_BTW, segments_BTW)
    if spec.embedding_norm:
        x_BTW = spec.embedding_norm.describe(embedding, "norm", x_BTW)
    return embedding.linear("widen", x_BTW, spec.width, bias=True) if spec.body.widens_embeddings() else x_BTW
