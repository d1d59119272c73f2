"""Mask and bias in the form that the chosen kernel takes, made once a forward for each group of layers that share them.

B batch, T queries, S keys, H heads, D head dim. Slots are indices in the row (padding included), positions count
real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from luban.kernels.attention_mask import AttentionMask, are_consecutive
from luban.kernels.dispatch import choice
from luban.kernels.distance import DistanceBias
from luban.kernels.intervals import Intervals
from luban.kernels.layout import BlockLayout
from luban.nn.mixer.base import AttentionShape
from luban.nn.mixer.layout import layout_for
from luban.nn.position.base import PositionEncoding, PositionMethod


@dataclass(frozen=True)
class PreparedMask:
    """Mask and bias for one kernel. The default: no mask, no bias."""

    kernel: str = "torch"  # of `kernels.dispatch`
    causal: bool = False  # the plain causal mask, which kernels apply themselves
    dense: Tensor | None = None  # torch: (1 or B, 1 or H, T, S) to add to the scores
    backward_only: bool = False  # no query attends to a later key, T = S
    intervals: Intervals | None = None  # luban: unless the mask is the plain causal one
    cu_seqlens: Tensor | None = None  # flash4: (B·C + 1,) offsets of packed documents; None: one document a row
    bias: DistanceBias | None = None  # luban
    layout: BlockLayout | None = None  # luban
    valid: Tensor | None = None  # (B, 1, 1, 1) factor on the output: NaN where intervals can't express the mask


class Bias(NamedTuple):
    """The bias of a position method on the scores of one forward."""

    form: str | None  # of the distance bias; "any": not a function of the distance; None: no bias
    encoding: PositionEncoding
    consecutive: Tensor | None = None  # () bool, true if given positions rise by one per token; None: they do

    def dense(self) -> Tensor | None:
        """(1 or B, H, T, S) float32."""
        return self.encoding.bias()

    def by_distance(self) -> DistanceBias | None:
        """The bias as a function of the distance between slots, for kernels, which don't read positions. NaN if given
        positions don't rise by one per slot."""
        bias = self.encoding.distance_bias
        if bias is None or self.consecutive is None:
            return bias
        return bias.times(torch.where(self.consecutive, 1.0, float("nan")))


def bias_of(
    method: PositionMethod, encoding: PositionEncoding, mask: AttentionMask, positions: Tensor, *, consecutive: bool
) -> Bias | None:
    """The bias of a position method; None if it has none.

    Args:
        positions: (1 or B, T) of the queries.
        consecutive: they were computed from the slots, so they rise by one per token.
    """
    if not method.biased:
        return None
    by_slot = consecutive or mask.queries == mask.keys  # else keys can have any positions
    form = method.bias_form if by_slot and method.bias_form else "any"
    if consecutive or form == "any":
        return Bias(form, encoding)
    return Bias(form, encoding, are_consecutive(positions, mask.documents, mask.token_mask))


def limited(mask: AttentionMask, shape: AttentionShape) -> AttentionMask:
    """The mask with a layer's window and layout applied."""
    if shape.layout is None and shape.window is None:
        return mask
    layout = None
    if shape.layout is not None:
        layout = layout_for(shape.layout, mask.keys, shape.heads, mask.causal, mask.device)
    return replace(mask, window=shape.window, layout=layout)


def prepare(
    mask: AttentionMask, bias: Bias | None = None, *, head_dim: int, dtype: torch.dtype, kernel: str | None = None
) -> PreparedMask:
    """Mask and bias for the kernel that the dispatcher picks.

    Args:
        head_dim: D. dtype: of the matmuls. kernel: name of the kernel to use; None: the fastest.
    """
    kind, square = mask.kind, _decided(mask.queries == mask.keys)
    if mask.layout is not None and mask.token_mask is not None and not torch.is_grad_enabled():
        kind = "irregular"  # prompts are padded on the left, but kernels count a layout's blocks from the first slot
    block = mask.layout.block if mask.layout else 0
    chosen = choice(
        mask.device.type,
        dtype,
        head_dim,
        kind,
        bias.form if bias else None,
        square,
        _decided(mask.queries == 1),
        torch.is_grad_enabled(),
        mask.too_many_documents,
        block,
        kernel,
    )
    if chosen == "luban":
        from luban.kernels.flash.attention import prepared

        valid_B = mask.valid()
        valid = None if valid_B is None else torch.where(valid_B, 1.0, float("nan"))[:, None, None, None]
        intervals = None if kind == "causal" else prepared(mask.intervals(), mask.keys)
        return PreparedMask(
            chosen,
            causal=kind == "causal",
            intervals=intervals,
            bias=bias.by_distance() if bias else None,
            layout=mask.layout,
            valid=valid,
        )
    if chosen == "flash4" and kind == "packed":
        return PreparedMask(chosen, causal=True, backward_only=True, cu_seqlens=_any_length(mask.cu_seqlens()))
    added = bias.dense() if bias else None
    if added is None and mask.layout is None and (kind == "all" or (kind == "causal" and square)):
        return PreparedMask(chosen, causal=kind == "causal", backward_only=kind == "causal")
    added = torch.zeros((), device=mask.device) if added is None else added
    dense = torch.where(mask.dense(), added, float("-inf")).to(dtype)
    return PreparedMask(chosen, dense=dense, backward_only=square and mask.causal and mask.prefix is None)


def _decided(condition: bool) -> bool:
    """The condition as a constant. In a graph traced for any number of tokens it is a symbol, which `choice` can't take:
    the branch puts a guard on it."""
    if condition:  # noqa: SIM103
        return True
    return False


def padding_mask(token_mask: Tensor | None, dtype: torch.dtype) -> PreparedMask:
    """Mask for cross-attention from (B, S) bool, false where a key is padding. A row that is all padding isn't masked, so
    that softmax gets at least one finite score."""
    if token_mask is None:
        return PreparedMask()
    visible = token_mask | ~token_mask.any(-1, keepdim=True)
    return PreparedMask(dense=torch.where(visible[:, None, None, :], 0.0, float("-inf")).to(dtype))


def _any_length(cu_seqlens: Tensor) -> Tensor:
    """The same tensor, marked dynamic: separately compiled blocks then have one graph for any number of documents."""
    if not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
    return cu_seqlens


def compute_dtype(x: Tensor) -> torch.dtype:
    """dtype in which matmuls over `x` run: autocast's if it is enabled."""
    kind = x.device.type  # a list instead of torch.amp.is_autocast_available, which torch 2.11 can't trace
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else x.dtype
