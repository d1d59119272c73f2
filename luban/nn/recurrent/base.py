"""Base config of recurrent layers.

N sequences, T tokens, I input width, E output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.registry import Registry, Variant


class CellCosts(NamedTuple):
    """FLOPs, parameters and saved activations of a recurrent layer."""

    flops: int  # forward, per token
    parameters: int
    saved: int  # elements saved for the backward pass, per token

    def __add__(self, other: CellCosts) -> CellCosts:  # type: ignore[override]
        """The sums."""
        return CellCosts(*(a + b for a, b in zip(self, other, strict=True)))


def matmul_costs(inputs: int, outputs: int, *, biases: int = 1, saved: int | None = None) -> CellCosts:
    """Costs of a matmul with a weight (outputs, inputs) and `biases` biases; saves `saved` elements, by default its output."""
    return CellCosts(2 * inputs * outputs, inputs * outputs + biases * outputs, outputs if saved is None else saved)


def gate_costs(inputs: int, width: int, gates: int) -> CellCosts:
    """Costs of `gates` matmuls of input and state, each with torch's two biases."""
    return matmul_costs(inputs + width, gates * width, biases=2, saved=(gates + 1) * width)


@dataclass(frozen=True, kw_only=True)
class Cell(Variant):
    """Base config of recurrent layers (registry `recurrent cell`)."""

    registry: ClassVar[Registry] = Registry(
        "recurrent cell",
        {
            "rnn": "luban.nn.recurrent.plain:RNN",
            "lstm": "luban.nn.recurrent.plain:LSTM",
            "stack_rnn": "luban.nn.recurrent.stack:StackRNN",
            "tape_rnn": "luban.nn.recurrent.tape:TapeRNN",
        },
    )

    def build(self, inputs: int, width: int) -> nn.Module:
        """The layer: `layer(x_NTI, given_N) -> (N, T, E)`, from an empty state; `given_N` (N,) is the number of input tokens."""
        raise NotImplementedError

    def costs(self, inputs: int, width: int) -> CellCosts:
        """Costs of the layer."""
        raise NotImplementedError

    def describe(self, graph: GraphBuilder, x_NTI: GraphTensor, width: int) -> GraphTensor:
        """Record the whole layer as one operation, (N, T, I) → (N, T, E): its time steps read each other's state."""
        costs, tokens = self.costs(x_NTI.shape[-1], width), x_NTI.elements // x_NTI.shape[-1]
        return graph.add(
            "",
            "recurrent",
            x_NTI,
            shape=(*x_NTI.shape[:-1], width),
            role="recurrent",
            flops=tokens * costs.flops,
            parameters=costs.parameters,
            saved_elements=tokens * costs.saved,
        )


def sequences(documents_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Indices that unpack the documents of packed rows into N sequences, padded to the longest, L tokens.

    Args:
        documents_BT: (B, T) int; a document ends where the number changes.

    Returns:
        (indices, real): (N, L) int64 indices into the flattened (B, T) tokens, 0 at padding; (N, L) bool, false at padding.
    """
    rows, length = documents_BT.shape
    first = torch.ones_like(documents_BT, dtype=torch.bool)
    first[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = first.flatten().nonzero().squeeze(-1)
    sizes = torch.diff(starts, append=starts.new_tensor([rows * length]))
    steps = torch.arange(int(sizes.max()), device=starts.device)
    real = steps < sizes[:, None]
    return torch.where(real, starts[:, None] + steps, 0), real


def backwards(x_NLE: Tensor, real_NL: Tensor) -> Tensor:
    """Reverse the real tokens of each sequence; padding stays at the end. Its own inverse.

    Args:
        x_NLE: (N, L, E). real_NL: (N, L) bool, false at padding, which is at the end.
    """
    steps = torch.arange(x_NLE.shape[1], device=x_NLE.device)
    order = torch.where(real_NL, real_NL.sum(-1, keepdim=True) - 1 - steps, steps)
    return x_NLE.gather(1, order[..., None].expand_as(x_NLE))
