"""The family of recurrent layers.

N sequences, T tokens, I input width, E output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from luban.core.opgraph import Op
from luban.core.registry import Registry, Variant


@dataclass(frozen=True, kw_only=True)
class Cell(Variant):
    """A family of recurrent layers."""

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
        """The layer: `layer(x_NTI, given_N) -> (N, T, E)`, from an empty state; `given_N` is how many tokens are input."""
        raise NotImplementedError

    def ops(self, tokens: int, inputs: int, width: int) -> list[Op]:
        """What it does over so many tokens."""
        raise NotImplementedError


def sequences(documents_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Where the documents of packed rows stand, one a line.

    Args:
        documents_BT: (B, T) int; a document ends where the number changes.

    Returns:
        (places, real): (N, L) flat places in the (B, T) grid, in order, and whether there is one (others say 0).
    """
    rows, length = documents_BT.shape
    fresh = torch.ones_like(documents_BT, dtype=torch.bool)
    fresh[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    starts = fresh.flatten().nonzero().squeeze(-1)
    sizes = torch.diff(starts, append=starts.new_tensor([rows * length]))
    steps = torch.arange(int(sizes.max()), device=starts.device)
    real = steps < sizes[:, None]
    return torch.where(real, starts[:, None] + steps, 0), real


def backwards(x_NLE: Tensor, real_NL: Tensor) -> Tensor:
    """Each sequence from its last real token to its first; what isn't real stays behind. Its own inverse."""
    steps = torch.arange(x_NLE.shape[1], device=x_NLE.device)
    order = torch.where(real_NL, real_NL.sum(-1, keepdim=True) - 1 - steps, steps)
    return x_NLE.gather(1, order[..., None].expand_as(x_NLE))
