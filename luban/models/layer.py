"""One layer as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from luban.core.errors import ConfigError
from luban.models.arrangement.base import Arrangement
from luban.models.arrangement.pre import PreNorm
from luban.nn.feedforward.base import FeedForward
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.base import Mixer
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import Norm, RMSNorm
from luban.nn.position.base import Position


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """A Transformer layer: the parts and how they are arranged. The defaults are LLaMA's at a size for a laptop."""

    mixer: Mixer = field(default_factory=lambda: Grouped(heads=8, kv_heads=4))  # how tokens exchange information
    feedforward: FeedForward = field(default_factory=lambda: SwiGLU(width=768))  # the position-wise network
    norm: Norm = field(default_factory=RMSNorm)  # of every part of the layer
    arrangement: Arrangement = field(default_factory=PreNorm)  # where norms and residuals stand
    position: Position | None = None  # another position method than the model's; none: the model's
    cross: bool = False  # whether it attends to an encoder's states too
    share: int | None = None  # the layer whose parameters it uses (ALBERT); none: its own

    def __post_init__(self):
        if self.share is not None and self.share < 0:
            raise ConfigError(f"a layer shares the parameters of an earlier one, counted from 0; {self.share} given")
