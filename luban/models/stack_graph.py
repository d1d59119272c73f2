"""The operations of a stack: embedding, layers and final norm.

B batch, T tokens, S encoder tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import ITEMSIZE, GraphTensor
from luban.models.arrangement.base import LayerParts
from luban.models.layer import LayerSpec
from luban.models.stack_checks import layer_position_shape, position_shape
from luban.nn.mixer.base import LayerShape
from luban.nn.position.base import Position, PositionShape

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


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
            sizes = layer_position_shape(spec, layer, shape)
            method = (position, sizes.heads, sizes.head_dim)
        if method not in bias_of:
            bias_of[method] = position.describe_bias(graph.scope(name), seq, seq, sizes)
        biases.append(bias_of[method])
    streams: tuple[GraphTensor, GraphTensor] | None = None  # of the reversible layers that are being run
    for index, layer in enumerate(layers):
        layer_shape = LayerShape(spec.width, index, len(layers), causal, spec.context)
        arrangement = layer.arrangement
        saves = not arrangement.reversible
        block = graph.scope(f"blocks.{index}", layer=True, shared=layer.share is not None, saves=saves)
        parts = LayerParts(block, layer, layer_shape, biases[index], states_BSE)
        if not arrangement.reversible:
            x_BTE = arrangement.describe(parts, x_BTE)
            continue
        streams = arrangement.describe_streams(parts, *(streams or (x_BTE, x_BTE)))
        if index + 1 == len(layers) or not layers[index + 1].arrangement.reversible:
            x_BTE, streams = _describe_merge(graph, index, *streams), None
    return layers[-1].norm.describe(graph, "norm", x_BTE) if layers[-1].arrangement.final_norm else x_BTE


def _describe_merge(graph: GraphBuilder, index: int, y1: GraphTensor, y2: GraphTensor) -> GraphTensor:
    """Record the mean of both streams behind reversible layer `index`; both are saved, in float32 or wider."""
    wide = "float64" if graph.dtype == "float64" else "float32"
    saved = 2 * y1.elements * ITEMSIZE[wide] // ITEMSIZE[graph.dtype]
    return graph.scope("blocks").add(f"merge_{index}", "add", y1, y2, shape=y1.shape, dtype=wide, saved_elements=saved)


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
