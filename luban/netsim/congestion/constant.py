"""No congestion control: a fixed window, as fast as the port sends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luban.netsim.compiled import compiled
from luban.netsim.congestion.base import Transport
from luban.netsim.congestion.parameters import BDP, CONSTANT, FIRST, LINE_RATE
from luban.netsim.engine.access import flow_at, lane_at, params_at

WINDOW, RATE = FIRST, FIRST + 1


@dataclass(frozen=True, kw_only=True)
class Constant(Transport):
    """No congestion control."""

    code: ClassVar[int] = CONSTANT

    window_bdp: float = 0.0  # window in bandwidth-delay products; 0: unlimited
    rate_share: float = 1.0  # pace at this share of the port's rate; 1: not paced

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """Window in bandwidth-delay products, share of the line rate."""
        return [self.window_bdp, self.rate_share]


@compiled
def start(s, lane):
    """Fix window and rate."""
    flow_at(s, lane_at(s, lane).flow)
    params = params_at(s, lane)
    lane_at(s, lane).window = params[WINDOW] * params[BDP] if params[WINDOW] > 0.0 else 1e18
    lane_at(s, lane).rate = 0.0 if params[RATE] == 1.0 else params[RATE] * params[LINE_RATE]
