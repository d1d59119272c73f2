"""Stack-RNN (Joulin & Mikolov 2015, in the form of Delétang et al. 2023, appendix A): a recurrent network with a stack.

N sequences, T tokens, I input width, E width, S depth of the stack, M width of its cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.nn.init import InitialValues
from luban.nn.linear import Linear
from luban.nn.recurrent.base import Cell, CellCosts, gate_costs, matmul_costs


@dataclass(frozen=True, kw_only=True)
class StackRNN(Cell):
    """Reads the top with every token; then pushes, pops and stays put, each in the measure of a softmax."""

    depth: int = 128  # S; what is pushed deeper is lost
    cell_width: int = 8  # M

    def __post_init__(self):
        if self.depth < 1 or self.cell_width < 1:
            raise ConfigError("the stack's depth and cell_width must be at least 1")

    def build(self, inputs: int, width: int) -> nn.Module:
        """The layer."""
        return StackLayer(self, inputs, width)

    def costs(self, inputs: int, width: int) -> CellCosts:
        """The network, its actions, what it pushes, and the stack after every token."""
        network = gate_costs(inputs + self.cell_width, width, gates=1)
        stack = CellCosts(0, 0, self.depth * self.cell_width)
        return network + matmul_costs(width, 3) + matmul_costs(width, self.cell_width) + stack


class RecurrentCell(nn.RNNCell):
    """h' = tanh(W x + U h + b), one step, written out so that torch.vmap can take several cells at once."""

    def forward(self, x_NI: Tensor, state_NE: Tensor) -> Tensor:  # type: ignore[override]
        """(N, I) and (N, E) → (N, E)."""
        fed = F.linear(x_NI, self.weight_ih, self.bias_ih)
        return torch.tanh(fed + F.linear(state_NE, self.weight_hh, self.bias_hh))

    def draw_parameters(self, draw: InitialValues) -> None:
        """Matrices with standard deviation 1/√inputs, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                parameter.copy_(draw.normal(name, parameter, parameter.shape[1] ** -0.5))
            else:
                parameter.zero_()


class StackLayer(nn.Module):
    """Steps through the tokens; the top of the stack is row 0."""

    def __init__(self, config: StackRNN, inputs: int, width: int):
        super().__init__()
        self.config, self.width = config, width
        self.cell = RecurrentCell(inputs + config.cell_width, width)
        self.actions = Linear(width, 3)  # push, pop, stay
        self.pushed = Linear(width, config.cell_width)

    def forward(self, x_NTI: Tensor, given_N: Tensor) -> Tensor:
        """(N, T, I) → (N, T, E)."""
        size = x_NTI.shape[0]
        state_NE = x_NTI.new_zeros(size, self.width)
        stack_NSM = x_NTI.new_zeros(size, self.config.depth, self.config.cell_width)
        out = []
        for x_NI in x_NTI.unbind(1):
            state_NE = self.cell(torch.cat((x_NI, stack_NSM[:, 0]), dim=-1), state_NE)
            push, pop, stay = self.actions(state_NE).softmax(-1)[..., None, None].unbind(1)
            pushed_NSM = torch.cat((self.pushed(state_NE)[:, None], stack_NSM[:, :-1]), dim=1)
            popped_NSM = torch.cat((stack_NSM[:, 1:], torch.zeros_like(stack_NSM[:, :1])), dim=1)
            stack_NSM = push * pushed_NSM + pop * popped_NSM + stay * stack_NSM
            out.append(state_NE)
        return torch.stack(out, dim=1)
