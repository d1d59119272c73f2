"""Attention weights of one forward, layer by layer, for looking at.

B batch, H heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luban.kernels.attention_mask import AttentionMask
from luban.nn.attention.backend import AttentionBackend, KeysValues
from luban.nn.attention.prepared_mask import Bias, PreparedMask, limited
from luban.nn.mixer.base import AttentionShape

CROSS = "cross-attention"


@dataclass
class LayerWeights:
    """What one layer weighed."""

    layer: int
    kind: str  # "attention", "cross-attention", or how a mixer calls what it does by itself
    weights_HTS: Tensor  # float32 on the CPU, of the first row
    stack: str = ""  # "encoder" or "decoder" of a model that has both


class RecordingAttention(AttentionBackend):
    """Attention without a cache that keeps its weights, written out. Every query's are a softmax over what it sees."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.found: list[LayerWeights] = []
        self.layer_running, self.kind = -1, "attention"

    def prepare(
        self, mask: AttentionMask, shape: AttentionShape, bias: Bias | None, dtype: torch.dtype
    ) -> PreparedMask:
        """The whole mask and bias, to be added to scores in float32."""
        visible = limited(mask, shape).dense()
        added = None if bias is None else bias.dense()
        added = torch.zeros((), device=mask.device) if added is None else added.float()
        return PreparedMask(dense=torch.where(visible, added, float("-inf")))

    def attend(
        self, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, mask: Any, cache: Any, scale: float | None
    ) -> Tensor:
        """Attention, (B, H, T, D)."""
        groups = q_BHTD.shape[1] // k_BKTD.shape[1]
        k_BHSD, v_BHSD = (x.repeat_interleave(groups, 1) for x in (k_BKTD, v_BKTD))
        scores = (q_BHTD.float() @ k_BHSD.float().mT) * (q_BHTD.shape[-1] ** -0.5 if scale is None else scale)
        weights = (scores if mask.dense is None else scores + mask.dense).softmax(-1)
        self.record(self.kind, weights)
        return (weights @ v_BHSD.float()).to(v_BKTD.dtype)

    def cross_attend(
        self,
        q_BHTD: Tensor,
        project: Callable[[Tensor], KeysValues],
        states_BSE: Tensor | None,
        mask: Any,
        cache: Any,
        scale: float | None,
    ) -> Tensor:
        """Attention to an encoder's states, (B, H, T, D), recorded as such."""
        self.kind = CROSS
        try:
            return super().cross_attend(q_BHTD, project, states_BSE, mask, cache, scale)
        finally:
            self.kind = "attention"

    def record(self, kind: str, weights_BHTS: Tensor) -> None:
        """Keep the first row's weights of the layer that runs."""
        self.found.append(LayerWeights(self.layer_running, kind, weights_BHTS[0].detach().float().cpu()))


@contextmanager
def recording(blocks: Sequence[nn.Module]) -> Iterator[RecordingAttention]:
    """A backend that records while the model runs; mixers that attend within buckets or clusters are asked what they do with a
    value that is 1 at one token alone, which is that token's weight.

    Args:
        blocks: of the model's stacks in the order in which they run, a shared one as often as it does.
    """
    backend = RecordingAttention()
    handles, order = [], iter(range(len(blocks)))

    def enter(*_: Any) -> None:
        backend.layer_running = next(order)

    def probe(module: nn.Module, args: tuple[Any, ...], _out: Any) -> None:
        *others, v_BHTD, ctx = args
        tokens = v_BHTD.shape[2]
        units = torch.eye(tokens, dtype=v_BHTD.dtype, device=v_BHTD.device).expand(*v_BHTD.shape[:2], -1, -1)
        backend.record(str(module.mixes_values), module.forward(*others, units, ctx))

    for block in dict.fromkeys(blocks):
        handles.append(block.register_forward_pre_hook(enter))
        for part in block.modules():
            if getattr(part, "mixes_values", False):
                handles.append(part.register_forward_hook(probe))
    try:
        yield backend
    finally:
        for handle in handles:
            handle.remove()
