"""Series adapters: a bottleneck behind a layer's parts, before the residual connection (Houlsby et al. 2019, figure 2;
Pfeiffer et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from luban.adapters.bottleneck import Bottleneck, BottleneckConfig
from luban.adapters.placement import Place, chosen_places
from luban.nn.linear import Projection


@dataclass(frozen=True, kw_only=True)
class Series(BottleneckConfig):
    """Base config of adapters that read the output of a projection that writes to the residual stream."""

    at_projections = True
    targets: tuple[str, ...] = ("o", "down")  # roles or patterns of the projections that they stand behind

    def places(self, model: nn.Module) -> list[Place]:
        """Those of `targets`."""
        return chosen_places(model, self.targets)

    def build(self, place: Place) -> Behind:
        """The bottleneck behind a projection."""
        return Behind(place.target.out_features, self)


@dataclass(frozen=True, kw_only=True)
class Houlsby(Series):
    """Two a layer, behind mixer and feed-forward network; norms are trained with them."""

    modules_to_save: tuple[str, ...] = ("norm",)  # modules trained whole beside the adapters: norm, embedding, lm_head


@dataclass(frozen=True, kw_only=True)
class Pfeiffer(Series):
    """One a layer, behind the feed-forward network."""

    targets: tuple[str, ...] = ("down",)  # roles or patterns of the projections that they stand behind


class Behind(Bottleneck):
    """y + bottleneck(y) of a projection's output y."""

    reads_output = True

    def forward(self, x: Tensor, y: Tensor, projection: Projection) -> Tensor:
        """The projection's output (…, O) → (…, O)."""
        return y + self.bottleneck(y)
