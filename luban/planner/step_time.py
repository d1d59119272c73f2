"""How long a training step will take: FLOPs at the rates of products and attention, everything else at the memory's.

Products and attention are compute, what lies between them is reading and writing; the parts run one after the other.
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
    JOINED,
    Setting,
    computed_share,
    is_written_out,
    joined_parameters,
    scores_of,
)

BACKWARD = 2.5  # work of attention's backward pass in forwards: five products for two
SUSTAINED = 0.87  # of a lone product's rate, for products inside a step on a GPU (an H100 at its power limit)

# Times that an operation's result is read or written around its product, forward and backward, neighbours fused:
# a norm reads its input and writes (2), and back reads two gradients and the input and writes (4); what is added to the
# stream is read with it and written (3); queries, keys and values are turned and turned back (4); a gated activation
# reads 2 and writes 1, and back reads 3 and writes 2 (8); inside of products most of that hides
# behind them, and between 8-bit ones rounding, which is counted with the products, shares its reading.
PASSES = {"norm": 6, "activation": 8, "inside": 3, "embedding": 4, "lm_head": 3, "stream": 3, "turned": 4}
WORDS = {"whole": "forward and backward"}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does a second."""

    products: float  # FLOP/s of products in the compute type
    eight: float | None = None  # FLOP/s of 8-bit products; none: there are none
    forward: float  # FLOP/s of attention
    backward: float  # the same of its backward pass
    bandwidth: float  # bytes read or written
    square: bool = False  # attention computes what its mask hides, too
    exponentials: float | None = None  # a second, with what stands around them; none: the memory is what limits


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to."""

    products: float
    attention: float
    elementwise: float
    update: float  # the optimizer and the gradient's norm
    whole: float = 0.0  # forward and backward passes that were timed as a whole, in place of the parts above

    @property
    def total(self) -> float:
        """Everything together."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{WORDS.get(name, name)} {milliseconds(part)}" for name, part in parts.items() if part)


def predict_step(
    graph: OpGraph, setting: Setting, rates: Rates, *, micro_batches: int = 1, update_flops: float = 0.0
) -> StepTime:
    """The time of one step.

    Args:
        graph: the operations of one micro-batch.
        update_flops: of products inside the optimizer.
    """
    products, attention, moved, exponentials = 0.0, 0.0, 0.0, 0.0
    for op in graph.ops:
        again = setting.remat == "full" and "blocks." in op.name
        if op.kind == "attention":
            written = is_written_out(op, setting)
            work = op.flops * (computed_share(op, graph.seq) if written else 1.0 if rates.square else op.density)
            attention += (1 + again) * work / rates.forward + BACKWARD * work / rates.backward
            if written and rates.exponentials:
                attention += (2 + again) * computed_share(op, graph.seq) * scores_of(op) / rates.exponentials
        elif rates.eight and "blocks." in op.name and _aligned(op):
            products += (2 + again) * op.flops / rates.eight + op.flops / rates.products
            moved += _quantised_bytes(op)
        else:
            products += (TRAINING_FACTOR + again) * op.flops / rates.products
        moved += setting.width * _passes(op, setting) * op.activation
        if op.kind == "activation" or op.kind == "lm_head":
            exponentials += (2 + again) * op.activation
    if setting.fused:
        moved += 4 * setting.width * joined_parameters(graph)
    return StepTime(
        products=micro_batches * products,
        attention=micro_batches * attention,
        elementwise=micro_batches * (moved / rates.bandwidth + exponentials / (rates.exponentials or inf)),
        update=update_time(graph, setting, rates, micro_batches=micro_batches, flops=update_flops),
    )


def update_time(graph: OpGraph, setting: Setting, rates: Rates, *, micro_batches: int = 1, flops: float = 0.0) -> float:
    """Seconds of the optimizer, the gradient's norm and the sums of micro-batches."""
    return _update_bytes(graph, setting, micro_batches) / rates.bandwidth + flops / rates.products


def _passes(op: Op, setting: Setting) -> float:
    """How often an operation's result crosses the memory."""
    kind = op.kind
    if kind == "linear":
        if op.name.endswith(("mixer.q", "mixer.k", "mixer.v")):
            kind = "turned"
        elif op.name.endswith((".output", ".down")):
            kind = "stream"
    if kind == "activation" and setting.activation_fused:
        return PASSES["inside"]
    again = {"none": 0, "selective": 1, "full": 2}[setting.remat] if kind in ("norm", "activation") else 0
    return PASSES.get(kind, 0) + again


def _aligned(op: Op) -> bool:
    return op.kind == "linear" and fits_float8(*op.sides)


def _quantised_bytes(op: Op) -> int:
    """Input, gradient and (twice) the weights are read for their scales, read again and written in 8 bits."""
    inputs, outputs = op.sides
    tokens, each = op.flops // max(1, 2 * inputs * outputs), 2 * HALF + 1
    shared = op.name.endswith(JOINED) and not op.name.endswith((".q", ".gate"))  # the joint product's input is one
    return each * (tokens * (outputs + (0 if shared else inputs)) + 2 * inputs * outputs)


def _update_bytes(graph: OpGraph, setting: Setting, micro_batches: int) -> int:
    """Moments and weights read and written, gradients read twice (once for their norm); sums of micro-batches."""
    n, summed = graph.parameters, setting.accumulate
    weights = 2 * (FP32 if setting.masters or not setting.half else HALF) * n
    copies = HALF * n if setting.masters and setting.half else 0
    gradients = 2 * (FP32 if summed else setting.width) * n
    sums = micro_batches * (2 * FP32 + setting.width) * n if summed else 0
    return weights + copies + gradients + sums + 2 * setting.optimizer
