"""Context parallelism: the tokens of every row divided among processes, in an order that gives each as much attention to
compute.

In a causal model a late token sees many keys and an early one few. So a row is cut into 2C pieces, and process c has the
pieces c and 2C − 1 − c (Brandon et al. 2023, striped attention's aim, in the order of Llama 3's report, section 3.3.2).

B batch, T tokens of a process, S = C·T tokens of a row, C processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luban.core.errors import ConfigError
from luban.kernels.attention_mask import AttentionMask
from luban.models.base import Model
from luban.models.stack import stacks_of
from luban.nn.attention.backend import AttentionBackend, NewTokens
from luban.nn.attention.prepared_mask import Bias
from luban.nn.mixer.base import AttentionShape
from luban.parallel.heads import HeadRange
from luban.parallel.ring import ring_attention
from luban.parallel.ring_blocks import RingMask
from luban.parallel.shard import message_device


def slots_of(rank: int, ranks: int, tokens: int) -> Tensor:
    """(T,) the slots of a row of S tokens that a process has, in order."""
    size = tokens // (2 * ranks)
    pieces = (rank, 2 * ranks - 1 - rank)
    return torch.cat([torch.arange(piece * size, (piece + 1) * size) for piece in pieces])


def tokens_of(tensors: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """A process's tokens of a batch: of the tensors whose last dimension is the row's."""
    if ranks == 1:
        return dict(tensors)
    tokens = tensors["tokens"].shape[1]
    slots = slots_of(rank, ranks, tokens).to(tensors["tokens"].device)
    found = {}
    for name, tensor in tensors.items():
        if name != "document_starts":  # of whole rows
            by_token = tensor.dim() > 1 and tensor.shape[-1] == tokens
            found[name] = tensor.index_select(-1, slots) if by_token else tensor
    return found


def check_context(model: Model) -> None:
    """Raise ConfigError for a model that reads a row otherwise than through attention and token by token."""
    spec = model.spec
    stacks = stacks_of(model)
    other = "use --plan.shard or --plan.tensor"
    if len(stacks) != 1:
        what = spec.body.registry.name_of(type(spec.body))
        raise ConfigError(f"plan.context divides the rows of a decoder or an encoder, and the body is {what}: {other}")
    if spec.head.pools or getattr(spec.head, "pair", False):
        raise ConfigError(f"plan.context divides rows, of which this model's head reads one state: {other}")
    if any(group.shape.layout for group in stacks[0].groups):
        raise ConfigError(f"plan.context does not go with block-sparse layouts: {other}")
    if any(getattr(method, "by_length", False) for method in model.modules()):
        raise ConfigError(f"plan.context does not go with positions that depend on the row's length: {other}")


class RingAttention(AttentionBackend):
    """Attention of a process's tokens to those of all processes, whose keys and values go round in a ring.

    Args:
        group: the processes that divide the rows.
        heads: those of this process, where heads are divided as well.
    """

    def __init__(self, group: dist.ProcessGroup, heads: HeadRange | None = None):
        super().__init__("torch")
        self.group, self.heads = group, heads
        self.rank, self.ranks = dist.get_rank(group), group.size()

    def begin(self, tokens: int, token_mask: Tensor | None, positions: Tensor | None) -> NewTokens:
        """Positions and padding of all processes' tokens, those of the first process first."""
        if positions is None:
            device = message_device(self.group) if token_mask is None else token_mask.device
            positions = slots_of(self.rank, self.ranks, tokens * self.ranks).to(device)[None]
        whole_mask = None if token_mask is None else self._gathered(token_mask)
        return NewTokens(positions, self._gathered(positions), whole_mask)

    def prepare(self, mask: AttentionMask, shape: AttentionShape, bias: Bias | None, dtype: torch.dtype) -> RingMask:
        """The mask of whole rows, of which blocks are made one by one."""
        slots = [slots_of(rank, self.ranks, mask.keys) for rank in range(self.ranks)]
        order = torch.cat(slots).argsort().to(mask.device)

        def in_row(tensor: Tensor | None, *, gathered: bool = False) -> Tensor | None:
            if tensor is None:
                return None
            return (tensor if gathered else self._gathered(tensor)).index_select(-1, order)

        whole = AttentionMask(
            queries=mask.keys,
            keys=mask.keys,
            causal=mask.causal,
            device=mask.device,
            window=shape.window,
            token_mask=in_row(mask.token_mask, gathered=True),
            documents=in_row(mask.documents),
            prefix=in_row(mask.prefix),
        )
        scores = None if bias is None else bias.dense()
        if scores is not None and self.heads is not None:
            begin, end = self.heads.of(shape.heads)
            scores = scores[:, begin:end]
        return RingMask(whole, [part.to(mask.device) for part in slots], self.rank, scores)

    def attend(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Any, cache: Any, scale: float | None
    ) -> Tensor:
        """Attention of the local queries to all keys, (B, H, T, D)."""
        factor = q_BHTD.shape[-1] ** -0.5 if scale is None else scale
        return ring_attention(q_BHTD, k_BKTD, v_BKTD, mask, factor, self.group)  # pyright: ignore[reportCallIssue]

    def _gathered(self, tensor: Tensor) -> Tensor:
        """(…, T) → (…, S): the tokens of all processes, those of the first first."""
        numbers = tensor.to(torch.int64).contiguous()
        parts = [torch.empty_like(numbers) for _ in range(self.ranks)]
        dist.all_gather(parts, numbers, group=self.group)
        return torch.cat(parts, dim=-1).to(tensor.dtype)
