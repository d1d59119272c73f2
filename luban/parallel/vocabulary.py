"""An embedding and an output layer whose vocabulary is divided among processes (Shoeybi et al. 2020, section 3).

The loss is that of the whole vocabulary: of every row of logits the processes exchange three numbers.

N rows, V vocabulary, v the part of it here, E width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luban.kernels.limits import IGNORED
from luban.nn.lm_head import Vocabulary
from luban.parallel.collectives import Peers, copy_to_parts, sum_parts


class DividedVocabulary(Vocabulary):
    """Logits of which this process has the columns from `first`.

    Args:
        whole: V.
    """

    fuses = False

    def __init__(self, peers: Peers, first: int, whole: int):
        self.peers, self.first, self.whole = peers, first, whole

    def cross_entropy(self, logits: Tensor, wanted: Tensor, smoothing: float, z_loss: float) -> Tensor:
        """Summed cross-entropy of logits (N, v) and targets (N,), alike in all processes."""
        return _CrossEntropy.apply(logits, wanted, self, smoothing, z_loss)

    def logprobs(self, logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Of logits (N, v) and targets (N,): log-probabilities of the targets, and entropies."""
        highest = self.peers.highest(logits.detach().amax(-1))
        shifted = logits - highest[:, None]
        exponentials = shifted.exp()
        total = sum_parts(exponentials.sum(-1), self.peers)
        index, here = self.local(wanted)
        picked = torch.where(here, shifted.gather(-1, index[:, None]).squeeze(-1), 0.0)
        mean = sum_parts((exponentials * shifted).sum(-1), self.peers) / total
        return torch.where(wanted == IGNORED, 0.0, sum_parts(picked, self.peers) - total.log()), total.log() - mean

    def joined(self, logits: Tensor) -> Tensor:
        """(…, v) → (…, V): the logits of all processes."""
        whole = logits.new_zeros(*logits.shape[:-1], self.whole)
        columns = torch.arange(self.first, self.first + logits.shape[-1], device=logits.device)
        return sum_parts(whole.index_copy(-1, columns, logits), self.peers)

    def local(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Targets (N,) as columns here, 0 where they are elsewhere; (N,) bool, whether they are here."""
        index = wanted - self.first
        here = (index >= 0) & (index < self.size) & (wanted != IGNORED)
        return torch.where(here, index, 0), here

    @property
    def size(self) -> int:
        """v."""
        parts, rank = self.peers.size, self.peers.rank
        return self.whole // parts + (rank < self.whole % parts)


class _CrossEntropy(torch.autograd.Function):
    """Σ over rows of lse − (1 − s)·target's logit − s/V·Σ logits + z·lse², with the gradient in closed form."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, wanted: Tensor, vocabulary: DividedVocabulary, smoothing: float, z_loss: float
    ) -> Tensor:
        highest = vocabulary.peers.highest(logits.amax(-1))
        shifted = logits - highest[:, None]
        index, here = vocabulary.local(wanted)
        picked = torch.where(here, shifted.gather(-1, index[:, None]).squeeze(-1), 0.0)
        exponentials, plain = shifted.exp(), shifted.sum(-1)
        total, picked, plain = vocabulary.peers.sum(torch.stack([exponentials.sum(-1), picked, plain]))
        lse, valid = total.log() + highest, wanted != IGNORED
        mean = plain / vocabulary.whole
        each = total.log() - (1 - smoothing) * picked - smoothing * mean + z_loss * lse.square()
        ctx.save_for_backward(exponentials / total[:, None], lse, index, here, valid)
        ctx.options = vocabulary.whole, smoothing, z_loss
        return torch.where(valid, each, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        shares, lse, index, here, valid = ctx.saved_tensors
        whole, smoothing, z_loss = ctx.options
        out = shares * (1 + 2 * z_loss * lse)[:, None] - smoothing / whole
        out.scatter_add_(-1, index[:, None], (here.to(out.dtype) * (smoothing - 1.0))[:, None])
        return out * (gradient * valid)[:, None], None, None, None, None


class DividedEmbedding:
    """Hooks around the lookup in a table of which this process has the rows from `first`: ids of other rows give zeros, and
    the processes' results are summed."""

    def __init__(self, peers: Peers, first: int, rows: int):
        self.peers, self.first, self.rows = peers, first, rows
        self.here: Tensor | None = None

    def enter(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Ids → rows of the local table."""
        local = args[0] - self.first
        self.here = (local >= 0) & (local < self.rows)
        return (torch.where(self.here, local, 0),)

    def leave(self, module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        """(…, E) of the local table → of the whole one."""
        assert self.here is not None
        return sum_parts(torch.where(self.here[..., None], out, 0.0), self.peers)


def enter_head(peers: Peers):
    """A hook before an output layer, which reads the same hidden states in all processes."""

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (copy_to_parts(args[0], peers), *args[1:])

    return enter
