"""How much memory a training step will need, from the operations of the model and what the trainer does with them.

What a layer of a pre-norm decoder keeps for its backward pass, with N tokens, width E, inner width I, queries of width Q
and keys and values of width K, in elements of the compute type:

    input of the block N·E, of its products (normalised) N·E, queries, keys and values N·(Q + 2K), attention's output
    N·Q with its log-sum-exp (fp32, one a head), the stream between N·E, normalised N·E, gate and up N·2I, inner N·I

which is what the operations say one by one (`Op.activation`). On a GPU the weights of joint products are kept side by
side as well, and the inner activation isn't where SwiGLU's gradient makes it again. Rematerialisation "selective" keeps
the outputs of matmuls and attention alone (and computes the inner activation and the joint weights again), "full" the
input of each layer.

On a CPU attention beside half-precision products either runs in fp32, with its inputs twice as wide and its output kept
twice, or is written out in bf16 products over chunks of queries (`nn.attention.attend`): then its weights are kept in
fp32, for the gradient of the softmax, and in bf16, for that of the values, and keys and values once for every chunk that
sees another part of them. All of this describes a compiled step; what an uncompiled one keeps is found by running it on
tensors without data (`train.trace_memory`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod
from typing import Literal

from luban.core.opgraph import Op, OpGraph
from luban.core.units import bytes_
from luban.kernels.limits import CHUNK_ELEMENTS, LARGEST_SQUARE, LOGIT_BYTES, query_chunk

FP32, HALF = 4, 2  # bytes
JOINED = (
    "mixer.q",
    "mixer.k",
    "mixer.v",
    "cross.k",
    "cross.v",
    "feedforward.gate",
    "feedforward.up",
)  # ends of ops' names


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the trainer does that memory depends on."""

    half: bool  # products in bf16 or fp16 (or 8 bits) instead of fp32
    masters: bool = True  # fp32 weights behind half-precision ones
    accumulate: bool = False  # several micro-batches a step, whose gradients are summed in fp32
    remat: str = "none"  # none, selective, full
    fused: bool = False  # the kernels of a GPU: joint products, logits a chunk at a time
    inner_kept: bool = True  # of a gated feed-forward network; else its activation is computed again with its gradient
    activation_fused: bool = False  # SwiGLU is computed inside the matmuls around it, or in 8 bits between them
    attention: Literal["fused", "wide", "written"] = (
        "fused"  # wide: in fp32 beside products in half precision; written: out in products where rows are short, else wide
    )
    masks: int = 0  # squares of queries and keys written out for every row, where attention isn't fused
    optimizer: int = 0  # bytes of its state
    workspace: int = 0  # bytes that its update needs beside

    @property
    def width(self) -> int:
        """Bytes of an element of the compute type."""
        return HALF if self.half else FP32


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """Bytes at the peak of a step, by what holds them."""

    parameters: int  # weights, and their half-precision copy where there are masters
    optimizer: int  # moments
    gradients: int  # those that are there at the peak
    activations: int  # what one micro-batch's forward keeps for its backward
    transient: int  # logits of a chunk, gradients of activations, the optimizer's own tensors

    @property
    def total(self) -> int:
        """Everything together."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {bytes_(getattr(self, field.name))}" for field in fields(self))
        return f"{bytes_(self.total)} ({parts})"


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that a micro-batch takes beside weights and optimizer, found by running it."""

    kept: int  # by the forward pass for the backward pass
    peak: int  # of everything that was there at once, gradients included


def predict_memory(graph: OpGraph, setting: Setting, footprint: Footprint | None = None) -> MemoryPrediction:
    """The memory of one training step at its peak.

    A step has three high places: the loss, when all activations are kept and logits are made; the first block of the
    backward pass; its end and the update, when all gradients are there. Between them one shrinks as the other grows.

    Args:
        graph: the model's operations for one micro-batch (`batch` × `seq` tokens).
        footprint: of an uncompiled step, which the operations don't tell; it stands for the first two places.
    """
    n, width = graph.parameters, setting.width
    sums = FP32 * n if setting.accumulate else 0
    fixed = {
        "parameters": (FP32 * n if setting.masters or not setting.half else 0) + (HALF * n if setting.half else 0),
        "optimizer": setting.optimizer,
    }
    if footprint is None:
        passes = _compiled_passes(graph, setting)
    else:
        passes = [(0, footprint.kept, footprint.peak - footprint.kept)]
    at = (
        *(
            MemoryPrediction(**fixed, gradients=sums + gradients, activations=kept, transient=transient)
            for gradients, kept, transient in passes
        ),
        MemoryPrediction(**fixed, gradients=sums + width * n, activations=0, transient=0),
        MemoryPrediction(**fixed, gradients=sums or width * n, activations=0, transient=setting.workspace),
    )
    return max(at, key=lambda moment: moment.total)


def _compiled_passes(graph: OpGraph, setting: Setting) -> list[tuple[int, int, int]]:
    """(gradients, activations, transient) bytes at the loss and in the first block of the backward pass."""
    kept = kept_bytes(graph, setting)
    table = max((setting.width * prod(op.sides) for op in graph.ops if op.kind == "lm_head"), default=0)
    return [
        (0, kept, _loss_bytes(graph, setting)),
        (table, kept, _made_again(graph, setting) + _backward_bytes(graph, setting)),
    ]


def kept_bytes(graph: OpGraph, setting: Setting) -> int:
    """Bytes that the forward pass of one micro-batch leaves for the backward pass."""
    total = 0
    for layer in graph.layers().values():
        if any(op.kind == "lm_head" for op in layer.ops):
            continue  # logits are the loss's own affair
        total += layer_bytes(layer, setting) if _is_block(layer) else setting.width * _elements(layer.ops)
    return total + _mask_bytes(graph, setting)


def _mask_bytes(graph: OpGraph, setting: Setting) -> int:
    """Masks in fp32, shared by all layers: where scores are written out they are made again."""
    kept = setting.attention != "fused" and any(
        op.kind == "attention" and not is_written_out(op, setting) for op in graph.ops
    )
    return FP32 * setting.masks * graph.batch * graph.seq**2 if kept else 0


def layer_bytes(layer: OpGraph, setting: Setting) -> int:
    """The same of one block."""
    if setting.remat == "full":
        return setting.width * layer.ops[-1].activation  # what goes into the next one
    selective = setting.remat == "selective"
    elements = _elements(op for op in layer.ops if not selective or op.kind in ("linear", "attention"))
    if not (selective or setting.inner_kept):
        elements -= _elements(op for op in layer.ops if op.kind == "activation")
    weights = setting.width * joined_parameters(layer) if setting.fused and setting.remat == "none" else 0
    return setting.width * elements + weights + sum(_attention_bytes(op, layer, setting) for op in layer.ops)


def _attention_bytes(op: Op, layer: OpGraph, setting: Setting) -> int:
    """What one attention keeps beyond its inputs and its output in the compute type."""
    if op.kind != "attention":
        return 0
    if is_written_out(op, setting):
        seen, parts = computed_share(op, layer.seq), -(-layer.seq // query_chunk(layer.seq))
        scores = int(seen * scores_of(op))
        if setting.remat == "selective":  # the outputs of products: scores
            return HALF * scores
        copies = seen * parts if looks_back(op) else 1
        return (FP32 + HALF) * scores + int((copies - 1) * HALF * _inputs(op, layer, ("k", "v")))
    sums = FP32 * op.heads * layer.batch * layer.seq  # the log-sum-exp
    if setting.attention == "fused" or not setting.half:
        return sums
    return sums + (FP32 - HALF) * _inputs(op, layer, ("q", "k", "v")) + FP32 * op.activation


def is_written_out(op: Op, setting: Setting) -> bool:
    """Whether this attention is computed by products over chunks of queries, its scores kept."""
    return setting.attention == "written" and setting.half and scores_of(op) <= LARGEST_SQUARE


def scores_of(op: Op) -> int:
    """Query–key pairs of an attention's full square, over all heads."""
    return op.flops // (4 * max(1, op.head_dim))


def looks_back(op: Op) -> bool:
    """Whether its mask is a triangle or lies within one (a narrow window to both sides is taken for one, too)."""
    return op.density <= 0.5


def computed_share(op: Op, seq: int) -> float:
    """Share of the square that chunks of queries compute under its mask."""
    chunk = query_chunk(seq)
    return (
        sum(min(chunk, seq - at) * min(at + chunk, seq) for at in range(0, seq, chunk)) / seq**2
        if looks_back(op)
        else 1
    )


def _inputs(op: Op, layer: OpGraph, which: tuple[str, ...]) -> int:
    """Elements of an attention's own queries, keys or values."""
    place = op.name.removesuffix("scores")
    return _elements(other for other in layer.ops if other.name in {place + name for name in which})


def joined_parameters(layer: OpGraph) -> int:
    """Weights that a block's joint products put side by side: queries, keys and values; gate and up."""
    gated = any(op.name.endswith("feedforward.gate") for op in layer.ops)
    return sum(
        op.parameters
        for op in layer.ops
        if op.name.endswith(JOINED) and (gated or not op.name.endswith("feedforward.up"))
    )


def _is_block(layer: OpGraph) -> bool:
    return any("blocks." in op.name for op in layer.ops)


def _elements(ops) -> int:
    return sum(op.activation for op in ops)


def _widest(graph: OpGraph) -> OpGraph | None:
    blocks = [layer for layer in graph.layers().values() if _is_block(layer)]
    return max(blocks, key=lambda layer: _elements(layer.ops), default=None)


def _inner(layer: OpGraph) -> list[Op]:
    """What a block's feed-forward network makes before its last product."""
    return [op for op in layer.ops if ".feedforward." in op.name and not op.name.endswith(".down")]


def _made_again(graph: OpGraph, setting: Setting) -> int:
    """Bytes of the one block that is being computed again, beside what was kept."""
    layer = _widest(graph)
    if layer is None or setting.remat == "none":
        return 0
    inner = _elements(op for op in layer.ops if op.kind == "activation") if setting.inner_kept else 0
    if setting.remat == "selective":
        weights = [
            int(computed_share(op, layer.seq) * scores_of(op))
            for op in layer.ops
            if op.kind == "attention" and is_written_out(op, setting)
        ]
        return setting.width * inner + (FP32 + HALF) * max(weights, default=0)
    return layer_bytes(layer, replace(setting, remat="none", fused=False))


def _backward_bytes(graph: OpGraph, setting: Setting) -> int:
    """Gradients of activations that are there at once: of a block's output, and of all in its feed-forward network.

    By then the states that the head read, and the input of the last norm, are gone.
    """
    layer = _widest(graph)
    if layer is None:
        return 0
    out = layer.ops[-1].activation
    return setting.width * (_elements(_inner(layer)) - out)


def _loss_bytes(graph: OpGraph, setting: Setting) -> int:
    """Logits of a chunk and their gradient; on a GPU also gradients of the rows and twice of the table, that in fp32.

    The gradient takes the logits' place.
    """
    head = next((op for op in graph.ops if op.kind == "lm_head"), None)
    if head is None or not head.activation:
        return 0
    if not setting.fused:
        return setting.width * min(head.activation, CHUNK_ELEMENTS)
    inputs, outputs = head.sides
    rows = head.activation // max(1, outputs) * inputs
    return min(setting.width * head.activation, LOGIT_BYTES) + 2 * FP32 * inputs * outputs + setting.width * rows
