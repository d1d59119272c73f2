"""Collectives with gradients, over the processes of one axis.

Each is the conjugate of another: what one does in the forward pass the other does in the backward pass (Shoeybi et al.
2020, section 3; Korthikanti et al. 2022, section 4.2). They are written in functional collectives, which torch.compile
traces.

B batch, T tokens, N processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

functional = torch.ops._c10d_functional
# as torch 2.13 calls them
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Peers:
    """The processes of an axis, as one of them sees them."""

    name: str  # of the process group
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Peers:
        """From a process group."""
        return cls(group.group_name, dist.get_rank(group), group.size())

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes, without a gradient."""
        return functional.wait_tensor(functional.all_reduce(x.contiguous(), "sum", self.name))

    def sum_(self, x: Tensor) -> Tensor:
        """The same, in x itself where it is contiguous; for inference."""
        return functional.wait_tensor(functional.all_reduce_(x.contiguous(), "sum", self.name))

    def join(self, x: Tensor) -> Tensor:
        """(…) → (N, …): x of every process, of the same shape in all, without a gradient."""
        return functional.wait_tensor(functional.all_gather_into_tensor(x[None].contiguous(), self.size, self.name))

    def highest(self, x: Tensor) -> Tensor:
        """The elementwise maximum over the processes, without a gradient."""
        return functional.wait_tensor(functional.all_reduce(x.contiguous(), "max", self.name))

    def slice_tokens(self, x: Tensor) -> Tensor:
        """(B, T, …) → (B, ⌈T/N⌉, …): this process's tokens, zeros behind the last."""
        size = -(-x.shape[1] // self.size)
        return _padded(x, size * self.size).narrow(1, self.rank * size, size)

    def join_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """(B, ⌈T/N⌉, …) → (B, T, …): the tokens of all processes."""
        joined = functional.wait_tensor(functional.all_gather_into_tensor(_tokens_first(x), self.size, self.name))
        return joined.transpose(0, 1)[:, :tokens]

    def sum_tokens(self, x: Tensor) -> Tensor:
        """(B, T, …) → (B, ⌈T/N⌉, …): this process's tokens of the sum over the processes."""
        size = -(-x.shape[1] // self.size)
        first = _tokens_first(_padded(x, size * self.size))
        return functional.wait_tensor(functional.reduce_scatter_tensor(first, "sum", self.size, self.name)).transpose(
            0, 1
        )


def _padded(x: Tensor, tokens: int) -> Tensor:
    short = tokens - x.shape[1]
    return x if not short else F.pad(x, (*(0, 0) * (x.dim() - 2), 0, short))


def _tokens_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.peers.sum(gradient), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        return peers.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers, ctx.tokens = peers, x.shape[1]
        return peers.slice_tokens(x).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.peers.join_tokens(gradient, ctx.tokens), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, tokens: int) -> Tensor:
        ctx.peers = peers
        return peers.join_tokens(x, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.peers.slice_tokens(gradient).contiguous(), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, tokens: int) -> Tensor:
        ctx.peers = peers
        return peers.join_tokens(x, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.peers.sum_tokens(gradient), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers, ctx.tokens = peers, x.shape[1]
        return peers.sum_tokens(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.peers.join_tokens(gradient, ctx.tokens), None


def copy_to_parts(x: Tensor, peers: Peers) -> Tensor:
    """What is alike in all processes, for parts of a layer: the same forward; the gradients of the parts are summed."""
    return _Copy.apply(x, peers)


def sum_parts(x: Tensor, peers: Peers) -> Tensor:
    """The sum of what the parts of a layer give; its gradient is alike in all processes."""
    return _Sum.apply(x, peers)


def slice_tokens(x: Tensor, peers: Peers) -> Tensor:
    """(B, T, …), alike in all processes → (B, ⌈T/N⌉, …), this process's tokens."""
    return _Slice.apply(x, peers)


def join_tokens(x: Tensor, peers: Peers, tokens: int) -> Tensor:
    """(B, ⌈T/N⌉, …) → (B, T, …), alike in all processes, as are the gradients that come back."""
    return _Join.apply(x, peers, tokens)


def gather_tokens(x: Tensor, peers: Peers, tokens: int) -> Tensor:
    """(B, ⌈T/N⌉, …) → (B, T, …) for parts of a layer: the gradients of the parts are summed."""
    return _Gather.apply(x, peers, tokens)


def scatter_parts(x: Tensor, peers: Peers) -> Tensor:
    """(B, T, …), what the parts of a layer give → (B, ⌈T/N⌉, …), this process's tokens of their sum."""
    return _Scatter.apply(x, peers)
