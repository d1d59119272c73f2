"""An embedding and an output layer whose vocabulary is divided among processes (Shoeybi et al. 2020, section 3).

The loss is that of the whole vocabulary: of every row of logits the processes exchange four numbers, the highest and three sums.

N rows, V vocabulary, v the part of it here, E width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.core.errors import UnsupportedError
from luban.kernels.available import triton_runs
from luban.kernels.limits import IGNORED, LOGIT_BYTES
from luban.nn.lm_head import Vocabulary
from luban.parallel.collectives import Peers, copy_to_parts, sum_parts


class DividedVocabulary(Vocabulary):
    """Logits of which this process has the columns from `first`.

    Args:
        whole: V.
    """

    def __init__(self, peers: Peers, first: int, whole: int):
        self.peers, self.first, self.whole = peers, first, whole

    def linear_cross_entropy(
        self, rows: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor, smoothing: float, z_loss: float
    ) -> Tensor:
        """Summed cross-entropy of rows (N, E) and targets (N,), alike in all processes; gradients are kept, not logits."""
        return _LinearCrossEntropy.apply(rows, weight, bias, wanted, self, smoothing, z_loss)

    def cross_entropy(self, logits: Tensor, wanted: Tensor, smoothing: float, z_loss: float) -> Tensor:
        """Only adapters need the loss of logits. Raises UnsupportedError."""
        raise UnsupportedError("an output layer that plan.tensor divides has no adapters")

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
        if not torch.is_grad_enabled():
            return self._gathered(logits)
        whole = logits.new_zeros(*logits.shape[:-1], self.whole)
        columns = torch.arange(self.first, self.first + logits.shape[-1], device=logits.device)
        return sum_parts(whole.index_copy(-1, columns, logits), self.peers)

    def _gathered(self, logits: Tensor) -> Tensor:
        """The same by half the messages, without a gradient. All parts are sent with the columns of the largest."""
        ranks, widest = self.peers.size, -(-self.whole // self.peers.size)
        parts = self.peers.join(F.pad(logits, (0, widest - logits.shape[-1])))
        if self.whole % ranks == 0:
            return parts.movedim(0, -2).flatten(-2)
        sizes = [widest - (rank >= self.whole % ranks) for rank in range(ranks)]
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], -1)

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


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of rows (N, E), for a bounded number of them at once; their gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: Tensor,
        vocabulary: DividedVocabulary,
        smoothing: float,
        z_loss: float,
    ) -> Tensor:
        wide = torch.promote_types(rows.dtype, torch.float32)
        d_rows, d_weight = torch.empty_like(rows), torch.zeros_like(weight, dtype=wide)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        loss = torch.zeros((), dtype=wide, device=rows.device)
        columns = -(-vocabulary.whole // vocabulary.peers.size)  # not this process's: all must cut the rows alike
        size = max(1, LOGIT_BYTES // (columns * wide.itemsize))
        for part, targets, out in zip(rows.split(size), wanted.split(size), d_rows.split(size), strict=True):
            logits = part @ weight.t() if bias is None else torch.addmm(bias, part, weight.t())
            logits = logits if triton_runs(logits) else logits.to(wide)
            loss += to_loss_and_gradient_(logits, targets, vocabulary, smoothing, z_loss)
            logits = logits.to(rows.dtype)
            torch.mm(logits, weight, out=out)
            d_weight += logits.t() @ part
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=wide)
        bias_gradient = None if bias is None or d_bias is None else d_bias.to(bias.dtype)
        ctx.save_for_backward(d_rows, d_weight.to(weight.dtype), bias_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        found = (None if kept is None else (kept * gradient).to(kept.dtype) for kept in ctx.saved_tensors)
        return *found, None, None, None, None


def to_loss_and_gradient_(
    logits: Tensor, wanted: Tensor, vocabulary: DividedVocabulary, smoothing: float, z_loss: float
) -> Tensor:
    """Σ over rows of lse − (1 − s)·target's logit − s/V·Σ logits + z·lse², a scalar alike in all processes; the logits (N, v)
    become its gradient in place. Kernels do it on a GPU."""
    on_gpu = triton_runs(logits) and logits.dtype != torch.float64
    if on_gpu:
        from luban.kernels.cross_entropy import row_statistics, to_gradient_

        local, picked, plain = row_statistics(logits, wanted, vocabulary.first)
    else:
        index, here = vocabulary.local(wanted)
        local, plain = logits.logsumexp(-1), logits.sum(-1)
        picked = torch.where(here, logits.gather(-1, index[:, None]).squeeze(-1), 0.0)
    highest, valid = vocabulary.peers.highest(local), wanted != IGNORED
    total, picked, plain = vocabulary.peers.sum(torch.stack([(local - highest).exp(), picked, plain]))
    lse = total.log() + highest
    each = lse - (1 - smoothing) * picked - smoothing / vocabulary.whole * plain + z_loss * lse.square()
    if on_gpu:
        options = {"smoothing": smoothing, "z_loss": z_loss, "whole": vocabulary.whole, "first": vocabulary.first}
        to_gradient_(logits, wanted, lse, **options)
    else:
        logits.sub_(lse[:, None]).exp_().mul_((1 + 2 * z_loss * lse)[:, None]).sub_(smoothing / vocabulary.whole)
        logits.scatter_add_(-1, index[:, None], (here.to(logits.dtype) * (smoothing - 1.0))[:, None])
        logits.mul_(valid[:, None])
    return torch.where(valid, each, 0.0).sum()


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
