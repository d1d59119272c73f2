"""The operation graph of a model, by arithmetic: nothing is allocated."""

from __future__ import annotations

from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import OpGraph
from luban.models.spec import ModelSpec


def describe(
    spec: ModelSpec, *, batch: int = 1, seq: int | None = None, target: int | None = None, dtype: str = "float32"
) -> OpGraph:
    """The operations of one forward: what each reads and returns, its FLOPs, parameters and saved activations.

    A multiply-add is two FLOPs; attention counts the full square, as torch's counter does; norms and
    activations count none. Saved activations are those of a fused attention without recomputation.

    Args:
        batch: sequences.
        seq: tokens a sequence; none: the whole context.
        target: tokens that an encoder–decoder's decoder reads; none: as many.
        dtype: of weights and matmuls, as torch names it.
    """
    seq = spec.context if seq is None else seq
    graph = GraphBuilder(dtype)
    hidden = spec.body.describe(graph, spec, batch, seq, target)
    spec.head.describe(graph.scope("head"), spec, hidden)
    return graph.graph(batch, seq)
