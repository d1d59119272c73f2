"""Sandwich norm (CogView, Ding et al. 2021, section 3.2): x + norm(attention(norm(x))), then the same with feed-forward."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from luban.core.opgraph import Op
from luban.models.block.serial import Serial, SerialBlock
from luban.nn.attention.mask import Frame
from luban.nn.position.family import PositionMethod

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


class SandwichNormBlock(SerialBlock):
    """One layer; what each part adds to the stream is normalised too, so it can't grow without bound."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        self.attention_output_norm = spec.norm.build(spec.width)
        self.feedforward_output_norm = spec.norm.build(spec.width)

    def forward(self, x_BTE: Tensor, frame: Frame, position: PositionMethod, layer: int) -> Tensor:
        """(B, T, E) → (B, T, E)."""
        mixed = self.attention(self.attention_norm(x_BTE), frame, position, layer)
        x_BTE = x_BTE + self.attention_output_norm(mixed)
        return x_BTE + self.feedforward_output_norm(self.feedforward(self.feedforward_norm(x_BTE)))


@dataclass(frozen=True, kw_only=True)
class SandwichNorm(Serial):
    """A norm before and a norm behind each part."""

    module = SandwichNormBlock

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """Each norm of the serial block twice."""
        ops = super().ops(spec, batch, seq)
        again = [replace(op, name=op.name.replace("_norm", "_output_norm")) for op in ops if op.name.endswith("_norm")
                 and "." not in op.name]  # fmt: skip
        return [*ops, *again]
