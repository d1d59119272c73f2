"""The family of block arrangements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from luban.core.opgraph import Op
from luban.core.registry import Registry, Variant

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Block(Variant):
    """A family of block arrangements."""

    registry: ClassVar[Registry] = Registry(
        "block arrangement",
        {
            "pre": "luban.models.block.pre:PreNorm",
            "post": "luban.models.block.post:PostNorm",
            "parallel": "luban.models.block.parallel:Parallel",
            "sandwich": "luban.models.block.sandwich:SandwichNorm",
            "deepnorm": "luban.models.block.deepnorm:DeepNorm",
            "chatglm": "luban.models.block.chatglm:NormedResidual",
        },
    )
    final_norm: ClassVar[bool] = True  # whether the stream is normalised after the last block

    def build(self, spec: ModelSpec) -> nn.Module:
        """One block: `block(x_BTE, frame, position, layer) -> (B, T, E)`."""
        raise NotImplementedError

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """What one block does to a batch."""
        raise NotImplementedError
