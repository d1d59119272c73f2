"""The simple recurrent network (Elman 1990) and the LSTM (Hochreiter & Schmidhuber 1997), computed by torch's own kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.nn.init import InitialValues
from luban.nn.recurrent.base import Cell, CellCosts, gate_costs, matmul_costs

FORGET = 1.0  # the forget gate's bias at the start (Jozefowicz et al. 2015)


@dataclass(frozen=True, kw_only=True)
class RNN(Cell):
    """h_t = tanh(W x_t + U h_{t−1} + b)."""

    def build(self, inputs: int, width: int) -> nn.Module:
        """The layer."""
        return RNNLayer(inputs, width, batch_first=True)

    def costs(self, inputs: int, width: int) -> CellCosts:
        """Two matmuls."""
        return gate_costs(inputs, width, gates=1)


@dataclass(frozen=True, kw_only=True)
class LSTM(Cell):
    """Input, forget and output gates around a cell state; optionally wider than what it gives out (Sak et al. 2014)."""

    cells: int | None = None  # width of the cell state, with a projection to the output behind it; none: no projection

    def __post_init__(self):
        if self.cells is not None and self.cells < 2:
            raise ConfigError(f"cells must be at least 2, {self.cells} given")

    def build(self, inputs: int, width: int) -> nn.Module:
        """The layer."""
        if self.cells is None:
            return LSTMLayer(inputs, width, batch_first=True)
        if self.cells <= width:
            raise ConfigError(
                f"cells must be more than the width {width} that they are projected to, {self.cells} given"
            )
        return LSTMLayer(inputs, self.cells, proj_size=width, batch_first=True)

    def costs(self, inputs: int, width: int) -> CellCosts:
        """Eight matmuls, and the projection."""
        if self.cells is None:
            return gate_costs(inputs, width, gates=4)
        gates = matmul_costs(inputs + width, 4 * self.cells, biases=2, saved=5 * self.cells)
        return gates + matmul_costs(self.cells, width, biases=0)


@torch.no_grad()
def draw_recurrent(layer: nn.RNNBase, draw: InitialValues) -> None:
    """Matrices with standard deviation 1/√inputs, biases 0."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2:
            parameter.copy_(draw.normal(name, parameter, parameter.shape[1] ** -0.5))
        else:
            parameter.zero_()


class RNNLayer(nn.RNN):
    """One layer of it."""

    def draw_parameters(self, draw: InitialValues) -> None:
        """Its own initialisation."""
        draw_recurrent(self, draw)

    def forward(self, x_NTI: Tensor, given_N: Tensor) -> Tensor:
        """(N, T, I) → (N, T, E)."""
        return super().forward(x_NTI)[0]


class LSTMLayer(nn.LSTM):
    """One layer of it."""

    bias_ih_l0: Tensor  # (4E,), torch's: input, forget, cell and output gates

    def draw_parameters(self, draw: InitialValues) -> None:
        """Its own initialisation; the forget gate begins open."""
        draw_recurrent(self, draw)
        input_gate, cell, output = torch.zeros(3, self.hidden_size)
        forget = torch.full_like(cell, FORGET)
        biases = torch.cat([input_gate, forget, cell, output])
        self.bias_ih_l0.copy_(draw.placed("bias_ih_l0", biases, self.bias_ih_l0))

    def forward(self, x_NTI: Tensor, given_N: Tensor) -> Tensor:
        """(N, T, I) → (N, T, E)."""
        return super().forward(x_NTI)[0]
