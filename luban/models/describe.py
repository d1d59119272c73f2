"""What a model would do to a batch, by arithmetic: nothing is allocated, whatever the size."""

from __future__ import annotations

from luban.core.opgraph import OpGraph
from luban.models.spec import ModelSpec


def describe(spec: ModelSpec, *, batch: int = 1, seq: int | None = None, target: int | None = None) -> OpGraph:
    """FLOPs, parameters and kept activations of every operation of one forward.

    A multiply-add is two FLOPs; attention counts the full square, as torch's counter does; norms and
    activations count none. Kept activations are those of a fused attention without recomputation.

    Args:
        batch: sequences.
        seq: tokens a sequence; none: the whole context.
        target: tokens that an encoder–decoder's decoder reads; none: as many.
    """
    seq = spec.context if seq is None else seq
    read = seq if target is None or not spec.body.two_sided else target  # tokens that the head reads
    ops = [*spec.body.ops(spec, batch, seq, target), *spec.head.ops(spec, batch, read)]
    return OpGraph(ops=tuple(ops), batch=batch, seq=seq)
