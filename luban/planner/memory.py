"""How much memory a training step will need, from the operations of the model and the optimizer's state."""

from __future__ import annotations

from dataclasses import dataclass, fields

from luban.core.opgraph import OpGraph
from luban.core.units import bytes_

FP32, HALF = 4, 2  # bytes


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """Bytes at the peak of a step, by what holds them."""

    parameters: int  # fp32 weights, and their half-precision copy where there is one
    gradients: int  # fp32 sums, and the half-precision gradients of one micro-batch
    optimizer: int  # moments
    activations: int  # what one micro-batch's forward keeps for its backward
    logits: int  # fp32 logits and their gradient for one micro-batch

    @property
    def total(self) -> int:
        """Everything together."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {bytes_(getattr(self, field.name))}" for field in fields(self))
        return f"{bytes_(self.total)} ({parts})"


def predict_memory(graph: OpGraph, *, vocab_size: int, optimizer: int, half: bool) -> MemoryPrediction:
    """The memory of one training step.

    Args:
        graph: the model's operations for one micro-batch (`batch` × `seq` tokens).
        vocab_size: width of the logits.
        optimizer: bytes of optimizer state.
        half: products in bf16 or fp16 beside fp32 masters, otherwise all in fp32.
    """
    n = graph.parameters
    return MemoryPrediction(
        parameters=n * (FP32 + HALF if half else FP32),
        gradients=n * (FP32 + HALF if half else FP32),
        optimizer=optimizer,
        activations=graph.activation_bytes(HALF if half else FP32),
        logits=2 * graph.batch * graph.seq * vocab_size * FP32,
    )
