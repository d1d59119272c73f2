"""Attention by its definition: every score is formed, biased, masked and normalised.

B batch, H query heads, K key heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from luban.kernels.intervals import Intervals


def attention(
    q_BHTD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Intervals,
    *,
    bias_HTS: Tensor | None = None,
    seen_HTS: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q·kᵀ·scale + bias)·v over what each query sees; (B, H, T, D). A query that sees nothing gets zeros.

    Args:
        bias_HTS: added to the scaled scores. seen_HTS: bool, a further restriction (block-sparse layouts).
        scale: 1/√D by default.
    """
    group = q_BHTD.shape[1] // k_BKSD.shape[1]
    k_BHSD, v_BHSD = (x.repeat_interleave(group, 1) for x in (k_BKSD, v_BKSD))
    scores = q_BHTD @ k_BHSD.transpose(-1, -2) * (scale or 1 / math.sqrt(q_BHTD.shape[-1]))
    if bias_HTS is not None:
        scores = scores + bias_HTS
    seen = mask.dense(k_BKSD.shape[2])
    if seen_HTS is not None:
        seen = seen & seen_HTS
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1)
    return weights.masked_fill(~seen, 0.0).nan_to_num(0.0) @ v_BHSD
