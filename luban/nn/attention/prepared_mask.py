"""Mask and bias in the form that the chosen kernel takes, made once a forward and shared by the layers that are alike.

B batch, T queries, S keys, H heads, D head dim. Slots are indices in the row (padding included), positions count
real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from luban.kernels.attention_mask import AttentionMask, consecutive
from luban.kernels.dispatch import choice
from luban.kernels.distance import DistanceBias
from luban.kernels.intervals import Intervals
from luban.kernels.layout import BlockLayout
from luban.nn.mixer.base import AttentionShape
from luban.nn.mixer.layout import layout_for
from luban.nn.position.base import PositionEncoding, PositionMethod


@dataclass(frozen=True)
class PreparedMask:
    """Mask and bias for one kernel. The default: every key is attended to, nothing is added."""

    kernel: str = "torch"  # of `kernels.dispatch`
    causal: bool = False  # the bare causal mask, which kernels apply themselves
    dense: Tensor | None = None  # torch: (1 or B, 1 or H, T, S) to add to the scores
    backward_only: bool = False  # no query attends to a later key, T = S
    intervals: Intervals | None = None  # luban: where the mask is not the bare causal one
    cu_seqlens: Tensor | None = None  # flash4: (B·C + 1,), where packed documents begin and end; None: rows as they are
    bias: DistanceBias | None = None  # luban
    layout: BlockLayout | None = None  # luban
    valid: Tensor | None = None  # (B, 1, 1, 1) factor on the results: NaN where intervals can't express the mask


class Bias(NamedTuple):
    """What a position method adds to the scores of one forward."""

    form: str | None  # of the distance bias, "any" for one that is no function of the distance; None: there is none
    encoding: PositionEncoding
    counted: Tensor | None = None  # () bool, whether given positions rise by one; None: they do

    def dense(self) -> Tensor | None:
        """(1 or B, H, T, S) float32."""
        return self.encoding.bias()

    def by_distance(self) -> DistanceBias | None:
        """For kernels, which know slots alone: NaN where given positions don't rise with them."""
        bias = self.encoding.distance_bias
        return (
            bias if bias is None or self.counted is None else bias.times(torch.where(self.counted, 1.0, float("nan")))
        )


def bias_of(
    method: PositionMethod, encoding: PositionEncoding, mask: AttentionMask, positions: Tensor, *, counted: bool
) -> Bias | None:
    """The bias of a position method, None where it has none.

    Args:
        positions: (1 or B, T) of the queries.
        counted: they were counted from the slots, so that they rise by one from token to token.
    """
    if not method.biased:
        return None
    slots = counted or mask.queries == mask.keys  # else keys may stand anywhere
    form = method.bias_form if slots and method.bias_form else "any"
    fine = None if counted or form == "any" else consecutive(positions, mask.documents, mask.token_mask)
    return Bias(form, encoding, fine)


def limited(mask: AttentionMask, shape: AttentionShape) -> AttentionMask:
    """The mask with a layer's own window or layout."""
    if shape.layout is None and shape.window is None:
        return mask
    layout = None
    if shape.layout is not None:
        layout = layout_for(shape.layout, mask.keys, shape.heads, mask.causal, mask.device)
    return AttentionMask(
        queries=mask.queries,
        keys=mask.keys,
        causal=mask.causal,
        device=mask.device,
        window=shape.window,
        layout=layout,
        token_mask=mask.token_mask,
        documents=mask.documents,
        document_starts=mask.document_starts,
        prefix=mask.prefix,
    )


def prepare(
    mask: AttentionMask, bias: Bias | None = None, *, head_dim: int, dtype: torch.dtype, kernel: str | None = None
) -> PreparedMask:
    """Mask and bias for the kernel that the dispatcher picks.

    Args:
        head_dim: D. dtype: of the matmuls. kernel: asked for by name.
    """
    kind, square = mask.kind, mask.queries == mask.keys
    if mask.layout is not None and mask.token_mask is not None and not torch.is_grad_enabled():
        kind = "irregular"  # prompts are padded on the left, and kernels count a layout's blocks from the first slot
    block = mask.layout.block if mask.layout else 0
    chosen = choice(
        mask.device.type,
        dtype,
        head_dim,
        kind,
        bias.form if bias else None,
        square,
        mask.queries == 1,
        torch.is_grad_enabled(),
        mask.too_many_documents,
        block,
        kernel,
    )
    if chosen == "luban":
        from luban.kernels.flash.attention import prepared

        fine = mask.valid()
        valid = None if fine is None else torch.where(fine, 1.0, float("nan"))[:, None, None, None]
        seen = None if kind == "causal" else prepared(mask.intervals(), mask.keys)
        return PreparedMask(
            chosen,
            causal=kind == "causal",
            intervals=seen,
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


def padding_mask(token_mask: Tensor | None, dtype: torch.dtype) -> PreparedMask:
    """For cross-attention: (B, S) bool, false where a key is padding. A row of padding alone attends to itself, so that
    no row of scores is empty."""
    if token_mask is None:
        return PreparedMask()
    seen = token_mask | ~token_mask.any(-1, keepdim=True)
    return PreparedMask(dense=torch.where(seen[:, None, None, :], 0.0, float("-inf")).to(dtype))


def _any_length(cu_seqlens: Tensor) -> Tensor:
    """The same; blocks that are compiled one by one then have one graph for any number of documents."""
    if not torch.compiler.is_compiling():
        torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
    return cu_seqlens


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision in which matmuls over `x` run: autocast's, where it is on."""
    kind = x.device.type  # a list instead of torch.amp.is_autocast_available, which torch 2.11 can't trace
    return torch.get_autocast_dtype(kind) if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) else x.dtype
