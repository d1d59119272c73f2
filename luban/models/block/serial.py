"""What the arrangements with attention first and feed-forward after it share: their parts and what these cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from luban.core.opgraph import Op, within
from luban.models.block.family import Block

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


class SerialBlock(nn.Module):
    """A norm beside attention and a norm beside the feed-forward network; a forward says where they stand."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.attention_norm = spec.norm.build(spec.width)
        self.attention = spec.attention.build(spec.width)
        self.feedforward_norm = spec.norm.build(spec.width)
        self.feedforward = spec.feedforward.build(spec.width)


@dataclass(frozen=True, kw_only=True)
class Serial(Block):
    """Attention, then feed-forward, each with one norm."""

    module: ClassVar[type[SerialBlock]]

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        return type(self).module(spec)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """Two norms, attention, feed-forward."""
        tokens = batch * seq
        return [
            spec.norm.op("attention_norm", tokens, spec.width),
            *within("attention", spec.attention.ops(batch, seq, spec.width)),
            spec.norm.op("feedforward_norm", tokens, spec.width),
            *within("feedforward", spec.feedforward.ops(tokens, spec.width)),
        ]
