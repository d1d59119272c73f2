"""µFAB (Wang et al. 2022): bandwidth shared by weight, from sums that switches keep over the flows on each link.

A packet adds its flow's weight to every link at the flow's start, takes it away at its end, and adds each change of its window.
The window is the smallest over the links of (weight/Σweights)·Σwindows·C·T/(tx·T + q): a link whose windows sum up to what it can
carry gives each flow its share of it, whoever asks for more.

Admission has two stages. Before the switches have answered a flow sends what its weight is guaranteed, `token_gbps` for each unit:
guarantees on a link never sum up to more than it carries where paths are chosen well. Then it grows towards its share, at most
twofold in a round trip, so that flows that come together meet a link that the others' windows are already known of.

With `routing per_path` a flow first sends one packet over each of its paths, and takes the one whose most subscribed link, by
Σweights·token/C, is least subscribed. While its own path is promised to more than it carries, it asks the others again every
one to two `reselect_us`, and leaves for one that is less subscribed with it.

The equation and both rules are this project's reading of the paper's description; leaving a path takes no time here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from luban.core.errors import ConfigError
from luban.netsim.compiled import compiled
from luban.netsim.congestion.base import Transport
from luban.netsim.congestion.parameters import BASE_RTT, BDP, BYTES_A_PS, FIRST, MICROSECOND, MIN_RATE, UFAB
from luban.netsim.engine.access import (
    flow_at,
    lane_at,
    node_at,
    packet_at,
    params_at,
    path_port,
    path_start,
    port_at,
    state_at,
    telemetry_at,
)
from luban.netsim.engine.heap import random_unit
from luban.netsim.engine.layout import (
    INT_BYTES,
    INT_FIELDS,
    INT_QUEUE,
    INT_RATE,
    INT_TIME,
    INT_WEIGHT,
    INT_WINDOW,
)

TOKEN, ETA, GROWTH, RESELECT = range(FIRST, FIRST + 4)
# State: window that the switches know of, time of the last update, hops in `lane.seen`, what the path is for, the subscription
# that its packet has found (−1: not answered yet), whether the switches know the flow's weight, when others were last asked (ps).
REPORTED, UPDATED, HOPS_SEEN, PHASE, SUBSCRIPTION, REGISTERED, ASKED = range(7)
IN_USE, ASKING, IDLE = range(3)
UNLIMITED = 1e18


@dataclass(frozen=True, kw_only=True)
class Ufab(Transport):
    """µFAB's edge and core."""

    code: ClassVar[int] = UFAB
    telemetry: ClassVar[int] = 1
    shares_by_weight: ClassVar[bool] = True

    header: int = 90  # bytes of headers a data packet, telemetry included
    token_gbps: float = 1.0  # bandwidth that a weight of 1 is guaranteed
    admission: Literal["two_stage", "at_once"] = (
        "two_stage"  # from the guarantee on, at most twofold a round trip; or line rate
    )
    reselect_us: float = 100.0  # per_path: between two looks at the other paths, microseconds
    eta: float = 0.95  # utilisation that is aimed at

    def __post_init__(self):
        super().__post_init__()
        self.require_share("eta")
        if self.token_gbps <= 0 or self.reselect_us <= 0:
            raise ConfigError("transport.token_gbps and transport.reselect_us must be above 0")

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """In the order of the constants above."""
        token = 1000 * self.token_gbps * BYTES_A_PS
        growth = 2.0 if self.admission == "two_stage" else UNLIMITED
        return [token, self.eta, growth, self.reselect_us * MICROSECOND]


@compiled
def start(s, lane):
    """Start on the only path, or ask on each of several."""
    control, state = lane_at(s, lane), state_at(s, lane)
    state[REPORTED], state[UPDATED], state[HOPS_SEEN], state[REGISTERED] = 0.0, -1.0, 0.0, 0.0
    state[ASKED] = s.now + random_unit(s) * params_at(s, lane)[RESELECT]
    if flow_at(s, control.flow).lanes == 1:
        _use(s, lane)
    else:
        _ask(s, lane)


@compiled
def _use(s, lane):
    """First stage: what the weight is guaranteed."""
    control, params = lane_at(s, lane), params_at(s, lane)
    weight = flow_at(s, control.flow).weight / 1000.0
    guaranteed = weight * params[TOKEN] * params[BASE_RTT]
    control.window = min(guaranteed if params[GROWTH] < UNLIMITED else params[BDP], params[BDP])
    control.rate = control.window / params[BASE_RTT]
    control.ejected = 0
    state_at(s, lane)[PHASE] = IN_USE


@compiled
def _ask(s, lane):
    """Let one packet go over this path."""
    control = lane_at(s, lane)
    control.window, control.rate, control.ejected = float(s.payload), 0.0, 0
    state_at(s, lane)[PHASE], state_at(s, lane)[SUBSCRIPTION] = ASKING, -1.0


@compiled
def register(s, lane, p, last):
    """What packet `p` tells the switches: the flow's weight once, and the window's change since the last packet."""
    control, state = lane_at(s, lane), state_at(s, lane)
    flow = flow_at(s, control.flow)
    if state[PHASE] == ASKING:
        control.ejected = 1  # one packet is enough
        if last:
            for other in range(flow.first_lane, flow.first_lane + flow.lanes):
                _sign_off(s, other)
        return
    window = 0.0 if last else control.window
    p.weight = 0 if state[REGISTERED] else flow.weight
    state[REGISTERED] = 1.0
    p.weight -= flow.weight if last else 0
    p.window = int(window) - int(state[REPORTED])
    state[REPORTED] = window


@compiled
def on_timeout(s, lane):
    """A path that was asked has not answered: ask again."""
    if state_at(s, lane)[PHASE] == ASKING:
        _ask(s, lane)


@compiled
def _sign_off(s, lane):
    """The switches of this path forget the flow."""
    control, state = lane_at(s, lane), state_at(s, lane)
    if state[REGISTERED]:
        flow = flow_at(s, control.flow)
        for i in range(path_start(s, control.path), path_start(s, control.path + 1)):
            port = port_at(s, path_port(s, i))
            port.weight -= flow.weight
            port.window -= int(state[REPORTED])
    state[REGISTERED], state[REPORTED] = 0.0, 0.0


@compiled
def on_ack(s, lane, packet):
    """Once a round trip, the smallest share over the links of the path; or what the path was asked for."""
    p, control, state = packet_at(s, packet), lane_at(s, lane), state_at(s, lane)
    flow = flow_at(s, control.flow)
    params = params_at(s, lane)
    state[SUBSCRIPTION] = _subscription_with(s, flow, lane, telemetry_at(s, packet), p.hops)
    if state[PHASE] != IN_USE:
        _choose(s, flow, lane)
        return
    if p.sent < state[UPDATED]:
        return
    if state[HOPS_SEEN] == p.hops and p.hops > 0:
        window = share_of_path(telemetry_at(s, packet), control.seen, p.hops, flow.weight, params)
        window = min(window, params[GROWTH] * control.window)
        control.window = min(max(window, params[MIN_RATE] * params[BASE_RTT]), params[BDP])
        control.rate = control.window / params[BASE_RTT]
    state[UPDATED], state[HOPS_SEEN] = s.now, p.hops
    for hop in range(p.hops):
        for field in range(INT_FIELDS):
            control.seen[hop, field] = telemetry_at(s, packet)[hop, field]
    if flow.lanes > 1 and state[SUBSCRIPTION] > 1.0 and s.now - state[ASKED] >= params[RESELECT]:
        state[ASKED] = s.now + random_unit(s) * params[RESELECT]  # tenants that meet don't all leave at once
        for other in range(flow.first_lane, flow.first_lane + flow.lanes):
            if other != lane:
                _ask(s, other)


@compiled
def _choose(s, flow, answered):
    """When all paths that were asked have answered: use the least subscribed, or leave the one in use for a better one."""
    best, used, asked = -1, -1, 0
    for lane in range(flow.first_lane, flow.first_lane + flow.lanes):
        state = state_at(s, lane)
        if state[PHASE] == IN_USE:
            used = lane
        elif state[PHASE] == ASKING:
            if state[SUBSCRIPTION] < 0.0:
                asked += 1
            elif best < 0 or state[SUBSCRIPTION] < state_at(s, best)[SUBSCRIPTION]:
                best = lane
    if asked or best < 0:
        return
    for lane in range(flow.first_lane, flow.first_lane + flow.lanes):
        if state_at(s, lane)[PHASE] == ASKING:
            state_at(s, lane)[PHASE] = IDLE
            lane_at(s, lane).ejected = 1
    params = params_at(s, best)
    if used < 0:
        _use(s, best)
    elif state_at(s, best)[SUBSCRIPTION] < state_at(s, used)[SUBSCRIPTION]:
        _sign_off(s, used)
        state_at(s, used)[PHASE] = IDLE
        lane_at(s, used).ejected = 1
        _use(s, best)
        state_at(s, best)[UPDATED], state_at(s, best)[HOPS_SEEN] = s.now, 0.0
        state_at(s, best)[ASKED] = s.now + random_unit(s) * params[RESELECT]


@compiled
def _subscription_with(s, flow, lane, records, hops):
    """How much of the most subscribed link of a path is promised when the flow uses it: links that its present path crosses too
    know its weight already."""
    path, most, hop, params = lane_at(s, lane).path, 0.0, 0, params_at(s, lane)
    for i in range(path_start(s, path), path_start(s, path + 1)):
        port = port_at(s, path_port(s, i))
        if hop < hops and node_at(s, port.node).reports:
            weight = records[hop, INT_WEIGHT] + (0 if _is_known_at(s, flow, path_port(s, i)) else flow.weight)
            most = max(most, subscription(weight, records[hop, INT_RATE], params))
            hop += 1
    return most


@compiled
def _is_known_at(s, flow, port):
    for lane in range(flow.first_lane, flow.first_lane + flow.lanes):
        if state_at(s, lane)[REGISTERED]:
            path = lane_at(s, lane).path
            for i in range(path_start(s, path), path_start(s, path + 1)):
                if path_port(s, i) == port:
                    return True
    return False


@compiled
def subscription(weight, rate, params):
    """The share of a link of `rate` Mb/s that weights (in thousandths) of this sum are promised."""
    return weight / 1000.0 * params[TOKEN] / (rate * BYTES_A_PS)


@compiled
def share_of_path(new, old, hops, weight, params):
    """The window (bytes) that the tightest link of the path gives to a flow of this weight."""
    least = UNLIMITED
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
