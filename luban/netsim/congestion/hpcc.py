"""HPCC (Li et al. 2019): windows set by the utilisation that switches report in every packet.

Each hop's utilisation is u = txRate/B + min(q, q_before)·B_NIC/(B·W_init), from two successive reports of the hop; the largest is
averaged over the base round-trip time T: U ← (1 − tau/T)·U + (tau/T)·u. If U ≥ eta, or after `max_stage` rounds of additive
increase, W = W_c/(U/eta) + W_AI, else W = W_c + W_AI. W follows every acknowledgement, its reference W_c once a round trip.
W_init is the line rate times T, and packets are paced at W/T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luban.netsim.compiled import compiled
from luban.netsim.congestion.base import Transport
from luban.netsim.congestion.parameters import BASE_RTT, BDP, BYTES_A_PS, FIRST, HPCC, LINE_RATE, MIN_RATE
from luban.netsim.engine.access import lane_at, packet_at, params_at, state_at, telemetry_at
from luban.netsim.engine.layout import INT_BYTES, INT_QUEUE, INT_RATE, INT_TIME

ETA, MAX_STAGE, W_AI = FIRST, FIRST + 1, FIRST + 2
REFERENCE, UTIL, STAGE, UPDATED, HOPS_SEEN = range(
    5
)  # state: W_c, U, incStage, when W_c was last set, hops in `lane.seen`


@dataclass(frozen=True, kw_only=True)
class Hpcc(Transport):
    """HPCC."""

    code: ClassVar[int] = HPCC
    telemetry: ClassVar[int] = 1

    header: int = 90  # bytes of headers a data packet, five records of telemetry included
    eta: float = 0.95  # utilisation that is aimed at
    max_stage: int = 0  # rounds of additive increase before a multiplicative one
    ai_mbps: float | None = None  # additive increase as a rate; by default 10 Mb/s for each 25 Gb/s of the port

    def __post_init__(self):
        super().__post_init__()
        self.require_share("eta")

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """In the order of the constants above."""
        ai = rate / 2500 if self.ai_mbps is None else self.ai_mbps
        return [self.eta, float(self.max_stage), ai * BYTES_A_PS * base_rtt]


@compiled
def start(s, lane):
    """Start with one bandwidth-delay product at line rate."""
    control = lane_at(s, lane)
    params = params_at(s, lane)
    control.window, control.rate = params[BDP], params[LINE_RATE]
    state = state_at(s, lane)
    state[REFERENCE], state[UTIL], state[STAGE], state[UPDATED], state[HOPS_SEEN] = params[BDP], 1.0, 0.0, -1.0, 0.0


@compiled
def on_ack(s, lane, packet):
    """Measure the utilisation of the path, then set window and rate."""
    p, control, state = packet_at(s, packet), lane_at(s, lane), state_at(s, lane)
    params = params_at(s, lane)
    if state[HOPS_SEEN] == p.hops and p.hops > 0:
        state[UTIL] = utilisation(telemetry_at(s, packet), control.seen, p.hops, state[UTIL], params)
        new_round = p.sent >= state[UPDATED]
        set_window(control, state, params, new_round)
        if new_round:
            state[UPDATED] = s.now
    state[HOPS_SEEN] = p.hops
    for hop in range(p.hops):
        for field in range(INT_RATE + 1):
            control.seen[hop, field] = telemetry_at(s, packet)[hop, field]


@compiled
def utilisation(new, old, hops, average, params):
    """The averaged utilisation after the records `new` (hops, fields), those of the last acknowledgement being `old`."""
    most, tau = 0.0, 0.0
    for hop in range(hops):
        rate = new[hop, INT_RATE] * BYTES_A_PS
        time = float(new[hop, INT_TIME] - old[hop, INT_TIME])
        if time <= 0.0:
            continue
        sent = (new[hop, INT_BYTES] - old[hop, INT_BYTES]) / time
        queued = min(new[hop, INT_QUEUE], old[hop, INT_QUEUE])
        used = sent / rate + queued * params[LINE_RATE] / (rate * params[BDP])
        if used > most:
            most, tau = used, time
    share = min(tau, params[BASE_RTT]) / params[BASE_RTT]
    return (1.0 - share) * average + share * most


@compiled
def set_window(control, state, params, new_round):
    """The window for the utilisation `state[UTIL]`, and the pace W/T."""
    if state[UTIL] >= params[ETA] or state[STAGE] >= params[MAX_STAGE]:
        window, stage = state[REFERENCE] / (state[UTIL] / params[ETA]) + params[W_AI], 0.0
    else:
        window, stage = state[REFERENCE] + params[W_AI], state[STAGE] + 1.0
    window = min(max(window, params[MIN_RATE] * params[BASE_RTT]), params[BDP])
    if new_round:
        state[REFERENCE], state[STAGE] = window, stage
    control.window, control.rate = window, window / params[BASE_RTT]
