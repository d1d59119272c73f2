"""µFAB (Wang et al. 2022): bandwidth shared by weight, from sums that switches keep over the flows on each link.

A packet adds its flow's weight to every link at the flow's start, takes it away at its end, and adds each change of its window.
The window is the smallest over the links of (weight/Σweights)·Σwindows·C·T/(tx·T + q): a link whose windows sum up to what it can
carry gives each flow its share of it, whoever asks for more. This form of the equation is a reading of the paper's description.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luban.netsim.compiled import compiled
from luban.netsim.congestion.base import Transport
from luban.netsim.congestion.parameters import BASE_RTT, BDP, BYTES_A_PS, FIRST, MIN_RATE, UFAB
from luban.netsim.engine.access import flow_at, lane_at, packet_at, params_at, state_at, telemetry_at
from luban.netsim.engine.layout import (
    INT_BYTES,
    INT_FIELDS,
    INT_QUEUE,
    INT_RATE,
    INT_TIME,
    INT_WEIGHT,
    INT_WINDOW,
)

START_SHARE, ETA = FIRST, FIRST + 1
REPORTED, UPDATED, HOPS_SEEN = range(
    3
)  # state: window that the switches know of, time of the last update, hops in `lane.seen`


@dataclass(frozen=True, kw_only=True)
class Ufab(Transport):
    """µFAB's edge and core."""

    code: ClassVar[int] = UFAB
    telemetry: ClassVar[int] = 1

    header: int = 90  # bytes of headers a data packet, telemetry included
    start_share: float = 0.1  # first window in bandwidth-delay products, before the switches have answered
    eta: float = 0.95  # utilisation that is aimed at

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """First window and target."""
        return [self.start_share, self.eta]


@compiled
def start(s, lane):
    """Start with a small window: the first packet asks what the path has to give."""
    control = lane_at(s, lane)
    params = params_at(s, lane)
    control.window = params[START_SHARE] * params[BDP]
    control.rate = control.window / params[BASE_RTT]
    state_at(s, lane)[REPORTED], state_at(s, lane)[UPDATED], state_at(s, lane)[HOPS_SEEN] = 0.0, -1.0, 0.0


@compiled
def register(s, lane, p, first, last):
    """What packet `p` tells the switches: weight at the ends of a flow, and the window's change since the last packet."""
    control, state = lane_at(s, lane), state_at(s, lane)
    flow = flow_at(s, control.flow)
    window = 0.0 if last else control.window
    p.weight = flow.weight if first else 0
    p.weight -= flow.weight if last else 0
    p.window = int(window) - int(state[REPORTED])
    state[REPORTED] = window


@compiled
def on_ack(s, lane, packet):
    """Once a round trip, the smallest share over the links of the path."""
    p, control, state = packet_at(s, packet), lane_at(s, lane), state_at(s, lane)
    flow = flow_at(s, control.flow)
    params = params_at(s, lane)
    if p.sent < state[UPDATED]:
        return
    if state[HOPS_SEEN] == p.hops and p.hops > 0:
        window = share_of_path(telemetry_at(s, packet), control.seen, p.hops, flow.weight, params)
        control.window = min(max(window, params[MIN_RATE] * params[BASE_RTT]), params[BDP])
        control.rate = control.window / params[BASE_RTT]
    state[UPDATED], state[HOPS_SEEN] = s.now, p.hops
    for hop in range(p.hops):
        for field in range(INT_FIELDS):
            control.seen[hop, field] = telemetry_at(s, packet)[hop, field]


@compiled
def share_of_path(new, old, hops, weight, params):
    """The window (bytes) that the tightest link of the path gives to a flow of this weight."""
    least = 1e18
    for hop in range(hops):
        time = float(new[hop, INT_TIME] - old[hop, INT_TIME])
        if time <= 0.0:
            continue
        period = params[BASE_RTT]
        capacity = params[ETA] * new[hop, INT_RATE] * BYTES_A_PS * period
        sent = (new[hop, INT_BYTES] - old[hop, INT_BYTES]) / time
        load = max(sent * period + min(new[hop, INT_QUEUE], old[hop, INT_QUEUE]), 0.05 * capacity)
        share = weight / max(new[hop, INT_WEIGHT], weight)
        windows = max(float(new[hop, INT_WINDOW]), 1.0)
        least = min(least, max(share * windows * capacity / load, share * capacity))
    return least
