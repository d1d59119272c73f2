"""What a model would do to a batch, by arithmetic: nothing is allocated, whatever the size."""

from __future__ import annotations

from luban.core.opgraph import Op, OpGraph, linear_op, within
from luban.models.spec import ModelSpec


def describe(spec: ModelSpec, *, batch: int = 1, seq: int | None = None) -> OpGraph:
    """FLOPs, parameters and kept activations of every operation of one forward.

    A multiply-add is two FLOPs; attention counts the full square, as torch's counter does; norms and
    activations count none. Kept activations are those of a fused attention without recomputation.

    Args:
        batch: sequences.
        seq: tokens a sequence; none: the whole context.
    """
    seq = spec.context if seq is None else seq
    tokens = batch * seq
    ops = [Op(name="embedding", kind="embedding", parameters=spec.vocab_size * spec.width,
              activation=tokens * spec.width)]  # fmt: skip
    if learned := spec.position.parameters(spec.position_shape):
        ops.append(Op(name="position", kind="embedding", parameters=learned))
    if spec.embedding_norm:
        ops.append(spec.embedding_norm.op("embedding_norm", tokens, spec.width))
    block = spec.block.ops(spec, batch, seq)
    for layer in range(spec.layers):
        ops += within(f"blocks.{layer}", block)
    if spec.block.final_norm:
        ops.append(spec.norm.op("norm", tokens, spec.width))
    head = linear_op("readout", tokens, spec.width, spec.vocab_size)
    if spec.tied_head:
        head = Op(name=head.name, kind=head.kind, flops=head.flops, activation=head.activation)
    return OpGraph(ops=(*ops, head), batch=batch, seq=seq)
