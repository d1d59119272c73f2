"""How much memory a training step will need, from the operations of the model and what the trainer does with them.

What a layer of a pre-norm decoder keeps for its backward pass, with N tokens, width E, inner width I, queries of width Q
and keys and values of width K, in elements of the compute type:

    input of the block N·E, of its products (normalised) N·E, queries, keys and values N·(Q + 2K), attention's output
    N·Q with its log-sum-exp (fp32, one a head), the stream between N·E, normalised N·E, gate and up N·2I, inner N·I

which is what the operations say one by one (`Op.activation`). On a GPU the weights of joint products are kept side by
side as well. Recomputation "cheap" keeps the outputs of products and attention alone (and makes the inner activation
and the joint weights again), "blocks" what goes into each block.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from luban.core.opgraph import Op, OpGraph
from luban.core.units import bytes_
from luban.kernels.limits import CHUNK_ELEMENTS, LOGIT_BYTES

FP32, HALF = 4, 2  # bytes
JOINED = ("attention.q", "attention.k", "attention.v", "feedforward.gate", "feedforward.up")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the trainer does that memory depends on."""

    half: bool  # products in bf16 or fp16 (or 8 bits) instead of fp32
    masters: bool = True  # fp32 weights behind half-precision ones
    accumulate: bool = False  # several micro-batches a step, whose gradients are summed in fp32
    recompute: str = "none"  # none, cheap, blocks
    fused: bool = False  # the kernels of a GPU: joint products, logits a chunk at a time
    wide_attention: bool = False  # attention in fp32 beside products in half precision, as on a CPU
    heads: int = 0  # query heads
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


def predict_memory(graph: OpGraph, setting: Setting) -> MemoryPrediction:
    """The memory of one training step at its peak.

    A step has three high places: the loss, when all activations are kept and logits are made; the first block of the
    backward pass; its end and the update, when all gradients are there. Between them one shrinks as the other grows.

    Args:
        graph: the model's operations for one micro-batch (`batch` × `seq` tokens).
    """
    n, width = graph.parameters, setting.width
    sums = FP32 * n if setting.accumulate else 0
    table = max(
        (width * op.flops // (2 * graph.batch * graph.seq) for op in graph.ops if op.name == "readout"), default=0
    )
    kept = kept_bytes(graph, setting)
    again = _made_again(graph, setting)
    fixed = {"parameters": (FP32 * n if setting.masters or not setting.half else 0) + (HALF * n if setting.half else 0),
             "optimizer": setting.optimizer}  # fmt: skip
    at = (
        MemoryPrediction(**fixed, gradients=sums, activations=kept, transient=_loss_bytes(graph, setting)),
        MemoryPrediction(
            **fixed, gradients=sums + table, activations=kept, transient=again + _backward_bytes(graph, setting)
        ),
        MemoryPrediction(**fixed, gradients=sums + width * n, activations=0, transient=0),
        MemoryPrediction(**fixed, gradients=sums or width * n, activations=0, transient=setting.workspace),
    )
    return max(at, key=lambda moment: moment.total)


def kept_bytes(graph: OpGraph, setting: Setting) -> int:
    """Bytes that the forward pass of one micro-batch leaves for the backward pass."""
    total = 0
    for name, layer in graph.layers().items():
        if name == "readout":
            continue  # logits are the loss's own affair
        total += layer_bytes(layer, setting) if _is_block(layer) else setting.width * _elements(layer.ops)
    return total


def layer_bytes(layer: OpGraph, setting: Setting) -> int:
    """The same of one block."""
    if setting.recompute == "blocks":
        return setting.width * layer.ops[-1].activation  # what goes into the next one
    kinds = {"linear", "attention"} if setting.recompute == "cheap" else {op.kind for op in layer.ops}
    elements = _elements(op for op in layer.ops if op.kind in kinds)
    sums = _wide_bytes(layer) if setting.wide_attention and setting.half else 0
    sums += FP32 * setting.heads * layer.batch * layer.seq * sum(op.kind == "attention" for op in layer.ops)
    weights = setting.width * joined_parameters(layer) if setting.fused and setting.recompute == "none" else 0
    return setting.width * elements + sums + weights


def _wide_bytes(layer: OpGraph) -> int:
    """What attention in fp32 keeps beyond half precision: its inputs are twice as wide, and its output is kept twice."""
    inputs = _elements(op for op in layer.ops if op.name.endswith(JOINED[:3]))
    return (FP32 - HALF) * inputs + FP32 * _elements(op for op in layer.ops if op.kind == "attention")


def joined_parameters(layer: OpGraph) -> int:
    """Weights that a block's joint products put side by side: queries, keys and values; gate and up."""
    gated = any(op.name.endswith("feedforward.gate") for op in layer.ops)
    return sum(op.parameters for op in layer.ops
               if op.name.endswith(JOINED) and (gated or not op.name.endswith("feedforward.up")))  # fmt: skip


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
    if layer is None or setting.recompute == "none":
        return 0
    inner = _elements(op for op in layer.ops if op.kind == "activation")
    if setting.recompute == "cheap":
        return setting.width * inner
    return setting.width * _elements(layer.ops)


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

    There the gradient takes the logits' place. Elsewhere it stands beside them, in their precision once compiled.
    """
    readout = next((op for op in graph.ops if op.name == "readout"), None)
    if readout is None or not readout.activation:
        return 0
    if not setting.fused:
        return 2 * setting.width * min(readout.activation, CHUNK_ELEMENTS)
    inputs, outputs = _sides(readout, graph)
    rows = graph.batch * graph.seq * inputs
    return min(setting.width * readout.activation, LOGIT_BYTES) + 2 * FP32 * inputs * outputs + setting.width * rows


def _sides(op: Op, graph: OpGraph) -> tuple[int, int]:
    """(inputs, outputs) of a dense layer."""
    return op.flops // (2 * op.activation), op.activation // (graph.batch * graph.seq)
