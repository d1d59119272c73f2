"""Predicts the time of one training step: matmuls and attention at the device's FLOP/s for each, everything else at its
memory bandwidth. The three don't overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import inf

from luban.core.opgraph import TRAINING_FACTOR, Op, OpGraph
from luban.core.units import milliseconds
from luban.kernels.limits import fits_float8
from luban.planner.memory import (
    FP32,
    HALF,
    StepSettings,
    computed_again,
    computed_fraction,
    is_chunked,
    joint_parameters,
    score_count,
)

BACKWARD = 2.5  # FLOPs of attention's backward pass relative to its forward: five matmuls to two
LABELS = {
    "matmul_seconds": "matmuls",
    "attention_seconds": "attention",
    "elementwise_seconds": "element-wise",
    "update_seconds": "optimizer",
    "measured_seconds": "forward and backward",
}

# Number of reads and writes of an operation's saved output, or of tensors of its size, outside of matmuls and attention
# in forward and backward, with adjacent element-wise operations fused.
NORM = 6  # forward reads the input and writes; backward reads two gradients and the input, and writes
ACTIVATION = 8  # gated: forward reads two and writes one; backward reads three and writes two
ACTIVATION_IN_MATMUL = 3  # most of it overlaps with the matmuls; in fp8 it shares its reads with quantisation
EMBEDDING = 4
LM_HEAD = 3
RESIDUAL = 3  # reads the residual and the addend, writes the sum
ROTATED = 4  # rotary on queries, keys and values in forward, its inverse in backward


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of a device, per second."""

    matmul: float  # FLOP/s of matmuls in the dtype of the model
    matmul_fp8: float | None = None  # FLOP/s of fp8 matmuls in the layers; None: no fp8
    attention_forward: float  # FLOP/s
    attention_backward: float  # FLOP/s
    bandwidth: float  # bytes read or written
    full_square: bool = False  # attention also computes masked scores
    exponentials: float | None = None  # exp, with the element-wise work around it; None: bandwidth is the limit


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by category."""

    matmul_seconds: float
    attention_seconds: float
    elementwise_seconds: float
    update_seconds: float  # optimizer and gradient norm
    measured_seconds: float = 0.0  # measured forward and backward, instead of the first three

    @property
    def total(self) -> float:
        """Sum of all categories."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = {label: getattr(self, name) for name, label in LABELS.items()}
        return ", ".join(f"{label} {milliseconds(part)}" for label, part in parts.items() if part)


def predict_step(
    graph: OpGraph, settings: StepSettings, rates: Rates, *, micro_batches: int = 1, update_flops: float = 0.0
) -> StepTime:
    """The time of one step.

    Args:
        graph: the operations of one micro-batch.
        update_flops: of matmuls inside the optimizer.
    """
    matmul, attention, moved, exponentials = 0.0, 0.0, 0.0, 0.0
    repeats = computed_again(graph, settings)
    for op in graph.ops:
        again = repeats if op.layer else 0.0
        if op.kind == "attention":
            attention += _attention_seconds(op, graph, settings, rates, again)
        elif rates.matmul_fp8 and op.layer and _fits_fp8(op):  # the gradient of the weight stays in bf16
            matmul += (2 + again) * op.flops / rates.matmul_fp8 + op.flops / rates.matmul
            moved += _quantised_bytes(op, graph)
        else:
            matmul += (TRAINING_FACTOR + again) * op.flops / rates.matmul
        moved += graph.itemsize * _passes(op, graph, settings, repeats) * op.saved_elements
        if op.kind in ("activation", "lm_head"):
            exponentials += (2 + again) * op.saved_elements
    if settings.gpu_kernels:
        moved += 4 * graph.itemsize * joint_parameters(graph)
    elementwise = moved / rates.bandwidth + exponentials / (rates.exponentials or inf)
    return StepTime(
        matmul_seconds=micro_batches * matmul,
        attention_seconds=micro_batches * attention,
        elementwise_seconds=micro_batches * elementwise,
        update_seconds=update_time(graph, settings, rates, micro_batches=micro_batches, flops=update_flops),
    )


def _attention_seconds(op: Op, graph: OpGraph, settings: StepSettings, rates: Rates, again: float) -> float:
    chunked = is_chunked(op, graph, settings)
    computed = computed_fraction(op) if chunked else 1.0 if rates.full_square else op.mask_density
    flops = op.flops * computed
    seconds = (1 + again) * flops / rates.attention_forward + BACKWARD * flops / rates.attention_backward
    if chunked and rates.exponentials:
        seconds += (2 + again) * computed * score_count(op) / rates.exponentials
    return seconds


def update_time(
    graph: OpGraph, settings: StepSettings, rates: Rates, *, micro_batches: int = 1, flops: float = 0.0
) -> float:
    """Seconds of the optimizer, the gradient norm and gradient accumulation."""
    return _update_bytes(graph, settings, micro_batches) / rates.bandwidth + flops / rates.matmul


def _passes(op: Op, graph: OpGraph, settings: StepSettings, repeats: float) -> float:
    """Number of reads and writes of an operation's saved output outside of matmuls and attention."""
    recomputed = 1 if "selective" in (settings.remat, settings.remat_layer) else 2 * repeats
    if op.kind == "norm":
        return NORM + recomputed
    if op.kind == "activation":
        return ACTIVATION_IN_MATMUL if settings.activation_in_matmul else ACTIVATION + recomputed
    if op.role in ("o", "down"):
        return RESIDUAL
    if op.role in ("q", "k", "v"):
        return ROTATED if _is_self_attention(op, graph) else 0
    return {"embedding": EMBEDDING, "lm_head": LM_HEAD}.get(op.kind, 0)


def _is_self_attention(op: Op, graph: OpGraph) -> bool:
    """True if queries, keys and values are projected from one input in one matmul."""
    return {"q", "k", "v"} <= {other.role for other in _fused_with(op, graph)}


def _fused_with(op: Op, graph: OpGraph) -> list[Op]:
    """The operations that can be computed in one matmul with this one, itself included."""
    return [
        other for other in graph.consumers(op.inputs[0]) if op.fusion_group and other.fusion_group == op.fusion_group
    ]


def _fits_fp8(op: Op) -> bool:
    return op.kind == "linear" and fits_float8(op.in_features, op.out_features)


def _quantised_bytes(op: Op, graph: OpGraph) -> int:
    """Bytes of quantisation: input, gradient and (twice) the weight are read for their scales, then read again and written
    in fp8. The input of a joint matmul counts once."""
    group = _fused_with(op, graph)
    inputs = graph.value(op.inputs[0]).elements if not group or group[0] is op else 0
    return (2 * HALF + 1) * (inputs + op.output.elements + 2 * op.in_features * op.out_features)


def _update_bytes(graph: OpGraph, settings: StepSettings, micro_batches: int) -> int:
    """Bytes of the update: moments and weights are read and written, gradients read twice (once for the norm); with
    accumulation also the sums over micro-batches."""
    n, itemsize = graph.parameters, graph.itemsize
    masters, summed = settings.master_weights and itemsize < FP32, settings.accumulates
    weights = 2 * (FP32 if masters else itemsize) * n
    copies = itemsize * n if masters else 0
    gradients = 2 * (max(FP32, itemsize) if summed else itemsize) * n
    sums = micro_batches * (2 * max(FP32, itemsize) + itemsize) * n if summed else 0
    return weights + copies + gradients + sums + 2 * settings.optimizer_bytes
