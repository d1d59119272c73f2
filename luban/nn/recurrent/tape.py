"""Tape-RNN (Delétang et al. 2023, appendix A; after Suzgun et al. 2019): a recurrent network with a circular tape.

N sequences, T tokens, I input width, E width, S cells of the tape, M width of a cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.nn.linear import Linear
from luban.nn.recurrent.base import Cell, CellCosts, gate_costs, matmul_costs
from luban.nn.recurrent.stack import RecurrentCell


@dataclass(frozen=True, kw_only=True)
class TapeRNN(Cell):
    """Reads the cell under the head with every token, writes it, then moves: stay, ±1, or ± the length of the input."""

    cells: int = 128  # S
    cell_width: int = 8  # M

    def __post_init__(self):
        if self.cells < 1 or self.cell_width < 1:
            raise ConfigError("the tape's cells and cell_width must be at least 1")

    def build(self, inputs: int, width: int) -> nn.Module:
        """The layer."""
        return TapeLayer(self, inputs, width)

    def costs(self, inputs: int, width: int) -> CellCosts:
        """The network, its moves, what it writes, and the tape after every token, mixed of five moved ones."""
        network = gate_costs(inputs + self.cell_width, width, gates=1)
        tape = self.cells * self.cell_width
        moved = CellCosts(2 * 5 * tape, 0, tape)
        return network + matmul_costs(width, 5) + matmul_costs(width, self.cell_width) + moved


class TapeLayer(nn.Module):
    """Steps through the tokens; the head stands at row 0, and the tape moves under it."""

    def __init__(self, config: TapeRNN, inputs: int, width: int):
        super().__init__()
        self.config, self.width = config, width
        self.cell = RecurrentCell(inputs + config.cell_width, width)
        self.moves = Linear(width, 5)  # stay, one right, one left, the input's length right, the same left
        self.written = Linear(width, config.cell_width)

    def forward(self, x_NTI: Tensor, given_N: Tensor) -> Tensor:
        """(N, T, I) → (N, T, E); `given_N` (N,) is the length of each input, the size of a jump."""
        size = x_NTI.shape[0]
        state_NE = x_NTI.new_zeros(size, self.width)
        tape_NSM = x_NTI.new_zeros(size, self.config.cells, self.config.cell_width)
        steps_N5 = torch.stack((given_N * 0, given_N * 0 + 1, given_N * 0 - 1, given_N, -given_N), dim=-1)
        places_N5S = (torch.arange(self.config.cells, device=x_NTI.device) + steps_N5[..., None]) % self.config.cells
        rows_N11 = torch.arange(size, device=x_NTI.device)[:, None, None]
        out = []
        for x_NI in x_NTI.unbind(1):
            state_NE = self.cell(torch.cat((x_NI, tape_NSM[:, 0]), dim=-1), state_NE)
            tape_NSM = torch.cat((self.written(state_NE)[:, None], tape_NSM[:, 1:]), dim=1)
            moves_N5 = self.moves(state_NE).softmax(-1)
            tape_NSM = torch.einsum("nk,nksm->nsm", moves_N5, tape_NSM[rows_N11, places_N5S])
            out.append(state_NE)
        return torch.stack(out, dim=1)
