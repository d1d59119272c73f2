"""Swift (Kumar et al. 2020): windows set by the delay against a target, down to thousandths of a packet.

Below the target the window grows by ai packets a round trip; above it, once a round trip, it shrinks by
max(1 − beta·(delay − target)/delay, 1 − max_mdf). The target is base + hops·per_hop + clamp(alpha_f/√window + beta_f, 0, range),
which lets many small windows have more queue. Windows below one packet are paced at window/rtt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from luban.netsim.compiled import compiled
from luban.netsim.congestion.base import Recovery, Transport
from luban.netsim.congestion.parameters import BASE_RTT, BDP, FIRST, MICROSECOND, MSS, SWIFT
from luban.netsim.engine.access import flow_at, lane_at, params_at, path_start, state_at

AI, BETA, MAX_MDF, BASE, PER_HOP, FS_RANGE, FS_ALPHA, FS_BETA, MIN_WINDOW, MAX_WINDOW, START = range(FIRST, FIRST + 11)
WINDOW, DECREASED, STREAK = range(3)  # state: window in packets, when it was last decreased (ps), timeouts in a row
RESET_AFTER = 5  # timeouts after which the window is the smallest


@dataclass(frozen=True, kw_only=True)
class Swift(Transport):
    """Swift."""

    code: ClassVar[int] = SWIFT

    recovery: Recovery = "selective"  # of lost packets
    ai: float = 1.0  # packets a round trip
    beta: float = 0.8  # decrease factor
    max_mdf: float = 0.5  # largest decrease at once
    base_us: float = 20.0  # target delay without hops and flow scaling
    per_hop_us: float | None = None  # target delay a hop; by default base/6.55
    fs_range: float = 5.0  # largest addition for small windows, in units of base
    fs_min: float = 0.1  # window in packets at and below which the addition is largest
    fs_max: float = 100.0  # window in packets from which there is none
    min_window: float = 0.001  # packets
    start_window: float = 10.0  # packets, at most one bandwidth-delay product
    max_bdp: float = 4.0  # largest window in bandwidth-delay products
    rto_us: float = 100_000.0  # smallest retransmission timeout, microseconds

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """In the order of the constants above; flow scaling solved for alpha_f and beta_f."""
        base = self.base_us * MICROSECOND
        per_hop = base / 6.55 if self.per_hop_us is None else self.per_hop_us * MICROSECOND
        fs_range = self.fs_range * base
        alpha = fs_range / (1 / math.sqrt(self.fs_min) - 1 / math.sqrt(self.fs_max))
        beta = -alpha / math.sqrt(self.fs_max)
        shape = [self.ai, self.beta, self.max_mdf, base, per_hop, fs_range, alpha, beta]
        return [*shape, self.min_window, self.max_bdp, self.start_window]


@compiled
def start(s, lane):
    """Start with a few packets."""
    params = params_at(s, lane)
    state_at(s, lane)[WINDOW] = max(min(params[BDP] / params[MSS], params[START]), 1.0)
    state_at(s, lane)[DECREASED] = -1e18
    state_at(s, lane)[STREAK] = 0.0
    _apply(s, lane)


@compiled
def target_delay(params, window, hops):
    """The delay (ps) that is aimed at with `window` packets over `hops` switches."""
    scaled = min(max(params[FS_ALPHA] / math.sqrt(window) + params[FS_BETA], 0.0), params[FS_RANGE])
    return params[BASE] + hops * params[PER_HOP] + scaled


@compiled
def on_ack(s, lane, acked):
    """Grow below the target, shrink above it."""
    control, state = lane_at(s, lane), state_at(s, lane)
    params = params_at(s, lane)
    state[STREAK] = 0.0
    hops = path_start(s, control.path + 1) - path_start(s, control.path) - 1
    target = target_delay(params, state[WINDOW], hops)
    if control.rtt < target:
        packets = acked / params[MSS]
        state[WINDOW] += params[AI] * packets / max(state[WINDOW], 1.0)
    elif _may_decrease(s, lane):
        factor = 1.0 - params[BETA] * (control.rtt - target) / control.rtt
        _decrease(s, lane, max(factor, 1.0 - params[MAX_MDF]))
    _apply(s, lane)


@compiled
def _may_decrease(s, lane):
    control = lane_at(s, lane)
    return s.now - state_at(s, lane)[DECREASED] >= max(flow_at(s, control.flow).srtt, control.rtt)


@compiled
def _decrease(s, lane, factor):
    state_at(s, lane)[WINDOW] *= factor
    state_at(s, lane)[DECREASED] = s.now


@compiled
def _apply(s, lane):
    """The window in bytes; below one packet, the pace."""
    control, state = lane_at(s, lane), state_at(s, lane)
    params = params_at(s, lane)
    most = max(params[MAX_WINDOW] * params[BDP] / params[MSS], 1.0)
    state[WINDOW] = min(max(state[WINDOW], params[MIN_WINDOW]), most)
    control.window = max(state[WINDOW], 1.0) * params[MSS]
    if state[WINDOW] < 1.0:
        control.rate = state[WINDOW] * params[MSS] / max(flow_at(s, control.flow).srtt, params[BASE_RTT])
    else:
        control.rate = 0.0


@compiled
def on_loss(s, lane):
    """The largest decrease, at most once a round trip."""
    if _may_decrease(s, lane):
        _decrease(s, lane, 1.0 - params_at(s, lane)[MAX_MDF])
        _apply(s, lane)


@compiled
def on_timeout(s, lane):
    """The largest decrease; after several timeouts in a row, the smallest window."""
    params = params_at(s, lane)
    state_at(s, lane)[STREAK] += 1.0
    if state_at(s, lane)[STREAK] >= RESET_AFTER:
        state_at(s, lane)[WINDOW] = params[MIN_WINDOW]
    elif _may_decrease(s, lane):
        _decrease(s, lane, 1.0 - params[MAX_MDF])
    _apply(s, lane)
