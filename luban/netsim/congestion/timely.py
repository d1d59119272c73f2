"""TIMELY (Mittal et al. 2015) and patched TIMELY (Zhu et al. 2016): rate control by the gradient of the round-trip time.

Once a segment: the smoothed difference of successive round-trip times over the smallest one is the gradient. Below T_low the rate
grows, above T_high it shrinks by 1 − beta·(1 − T_high/rtt); between them it grows by delta where the gradient isn't positive (by
5·delta after five times in a row) and shrinks by 1 − beta·gradient where it is. The patch compares the round-trip time itself with
a reference, R ← delta·(1 − w) + R·(1 − beta·w·(rtt − ref)/ref), with w the gradient's place between −1/4 and 1/4, so that there is
one fixed point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luban.netsim.compiled import compiled
from luban.netsim.congestion.base import Transport
from luban.netsim.congestion.parameters import BYTES_A_PS, FIRST, LINE_RATE, MICROSECOND, MIN_RATE, TIMELY
from luban.netsim.engine.access import lane_at, params_at, state_at

A, BETA, T_LOW, T_HIGH, MIN_RTT, DELTA, SEGMENT, START, PATCHED = range(FIRST, FIRST + 9)
PREVIOUS, DIFFERENCE, BYTES, GOOD = range(
    4
)  # state: last rtt (ps), smoothed difference (ps), bytes, increases in a row
HYPER_AFTER = 5


@dataclass(frozen=True, kw_only=True)
class Timely(Transport):
    """TIMELY."""

    code: ClassVar[int] = TIMELY
    patched: ClassVar[bool] = False

    a: float = 0.875  # weight of the newest difference of round-trip times
    beta: float = 0.8  # decrease factor
    t_low_us: float = 50.0  # below, the rate grows whatever the gradient
    t_high_us: float = 500.0  # above, it shrinks
    min_rtt_us: float = 20.0  # what gradients are measured against
    delta_mbps: float | None = None  # increase a step; by default a thousandth of the port's rate
    segment: int = 16_000  # bytes between two updates
    start_share: float = 1.0  # share of the port's rate to start with

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """In the order of the constants above."""
        delta = rate / 1000 if self.delta_mbps is None else self.delta_mbps
        times = [x * MICROSECOND for x in (self.t_low_us, self.t_high_us, self.min_rtt_us)]
        last = [delta * BYTES_A_PS, float(self.segment), self.start_share, float(self.patched)]
        return [self.a, self.beta, *times, *last]


@dataclass(frozen=True, kw_only=True)
class PatchedTimely(Timely):
    """Patched TIMELY."""

    patched: ClassVar[bool] = True

    beta: float = 0.008  # decrease factor


@compiled
def start(s, lane):
    """Start at a share of the line rate."""
    control = lane_at(s, lane)
    params = params_at(s, lane)
    control.window, control.rate = 1e18, params[START] * params[LINE_RATE]
    state_at(s, lane)[PREVIOUS] = state_at(s, lane)[DIFFERENCE] = state_at(s, lane)[BYTES] = state_at(s, lane)[GOOD] = (
        0.0
    )


@compiled
def on_ack(s, lane, acked):
    """One update a segment."""
    control, state = lane_at(s, lane), state_at(s, lane)
    params = params_at(s, lane)
    state[BYTES] += acked
    if state[BYTES] < params[SEGMENT]:
        return
    state[BYTES] = 0.0
    if state[PREVIOUS] > 0.0:
        control.rate = next_rate(state, params, control.rate, control.rtt)
        control.rate = min(max(control.rate, params[MIN_RATE]), params[LINE_RATE])
    state[PREVIOUS] = control.rtt


@compiled
def next_rate(state, params, rate, rtt):
    """The rate (bytes a ps) after a segment whose round-trip time was `rtt` (ps)."""
    state[DIFFERENCE] += params[A] * (rtt - state[PREVIOUS] - state[DIFFERENCE])
    gradient = state[DIFFERENCE] / params[MIN_RTT]
    good = state[GOOD]
    state[GOOD] = 0.0
    if rtt < params[T_LOW]:
        return rate + params[DELTA]
    if rtt > params[T_HIGH]:
        return rate * (1.0 - params[BETA] * (1.0 - params[T_HIGH] / rtt))
    if params[PATCHED]:
        weight = min(max(2.0 * gradient + 0.5, 0.0), 1.0)
        error = (rtt - params[T_LOW]) / params[T_LOW]
        return params[DELTA] * (1.0 - weight) + rate * (1.0 - params[BETA] * weight * error)
    if gradient <= 0.0:
        state[GOOD] = good + 1.0
        return rate + params[DELTA] * (HYPER_AFTER if state[GOOD] >= HYPER_AFTER else 1.0)
    return rate * max(1.0 - params[BETA] * gradient, 0.5)
