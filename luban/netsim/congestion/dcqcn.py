"""DCQCN (Zhu et al. 2015): rate control by congestion notifications.

On a notification: R_T = R_C, R_C ← R_C·(1 − alpha/2), at most once each `decrease_us`. alpha is updated each `alpha_us`:
(1 − g)·alpha + g if a notification came in the interval, (1 − g)·alpha if none did. Between notifications the rate recovers at
each tick of a timer and each `byte_counter` bytes: the first F steps of both halve the distance to R_T (fast recovery); when one
of them has gone on, R_T grows by R_AI, when both have, by R_HAI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luban.netsim.compiled import compiled
from luban.netsim.congestion.base import Transport
from luban.netsim.congestion.parameters import BDP, BYTES_A_PS, DCQCN, FIRST, LINE_RATE, MICROSECOND, MIN_RATE
from luban.netsim.congestion.timers import arm
from luban.netsim.engine.access import lane_at, packet_at, params_at, state_at

G, ALPHA_TIME, DECREASE_TIME, RATE_TIME, BYTE_COUNTER, FAST_STEPS, R_AI, R_HAI, WINDOW = range(FIRST, FIRST + 9)
# State; times in ps.
TARGET, ALPHA, ALPHA_SINCE, NOTIFIED, DECREASED, BYTES, TIMER_STEPS, BYTE_STEPS, TICK, SEEN = range(10)


@dataclass(frozen=True, kw_only=True)
class Dcqcn(Transport):
    """DCQCN with the timers of HPCC's published simulation."""

    code: ClassVar[int] = DCQCN

    g: float = 1 / 256  # weight of the newest interval in alpha
    cnp_us: float = 0.0  # microseconds between notifications to one sender; 0: every mark is echoed
    alpha_us: float = 1.0  # interval of alpha's update, microseconds
    decrease_us: float = 4.0  # smallest time between two decreases, microseconds
    rate_us: float = 300.0  # interval of the increase timer, microseconds
    byte_counter: float = 0.0  # bytes between two increases by bytes; 0: increases by the timer alone
    fast_steps: int = 1  # F, steps of fast recovery
    ai_mbps: float | None = None  # additive increase; by default the port's rate / 5000
    hai_mbps: float | None = None  # hyper increase; by default the port's rate / 500
    window_bdp: float = 0.0  # limit of what is in flight, in bandwidth-delay products; 0: none

    def cnp_gap_us(self) -> float:
        """Microseconds between notifications."""
        return self.cnp_us

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """In the order of the constants above."""
        times = [x * MICROSECOND for x in (self.alpha_us, self.decrease_us, self.rate_us)]
        ai = rate / 5000 if self.ai_mbps is None else self.ai_mbps
        hai = rate / 500 if self.hai_mbps is None else self.hai_mbps
        steps = [self.byte_counter, float(self.fast_steps), ai * BYTES_A_PS, hai * BYTES_A_PS, self.window_bdp]
        return [self.g, *times, *steps]

    def marks(self, rate: int) -> tuple[float, float, float]:
        """400 kB, 1600 kB and 20% at 100 Gb/s, the bounds scaled with the rate."""
        return 4.0 * rate, 16.0 * rate, 0.2


@dataclass(frozen=True, kw_only=True)
class DcqcnPaper(Dcqcn):
    """DCQCN with the paper's parameters."""

    cnp_us: float = 50.0  # microseconds between notifications to one sender
    alpha_us: float = 55.0  # interval of alpha's update, microseconds
    decrease_us: float = 50.0  # smallest time between two decreases, microseconds
    rate_us: float = 55.0  # interval of the increase timer, microseconds
    byte_counter: float = 10e6  # bytes between two increases by bytes
    fast_steps: int = 5  # F, steps of fast recovery
    ai_mbps: float | None = 40.0  # additive increase
    hai_mbps: float | None = 400.0  # hyper increase

    def marks(self, rate: int) -> tuple[float, float, float]:
        """5 kB, 200 kB and 1% at 40 Gb/s, the bounds scaled with the rate."""
        return 0.125 * rate, 5.0 * rate, 0.01


@compiled
def start(s, lane):
    """Start at line rate with alpha = 1."""
    control = lane_at(s, lane)
    params, state = params_at(s, lane), state_at(s, lane)
    control.rate = params[LINE_RATE]
    control.window = params[WINDOW] * params[BDP] if params[WINDOW] > 0.0 else 1e18
    state[TARGET], state[ALPHA] = control.rate, 1.0
    state[NOTIFIED] = state[BYTES] = state[TIMER_STEPS] = state[BYTE_STEPS] = state[SEEN] = 0.0


@compiled
def _update_alpha(s, lane):
    """Catch up with the intervals that have ended: the first with the notification that it may have had, the others without."""
    params, state = params_at(s, lane), state_at(s, lane)
    intervals = int((s.now - state[ALPHA_SINCE]) / params[ALPHA_TIME])
    if intervals > 0:
        state[ALPHA] = (1.0 - params[G]) ** intervals * (
            state[ALPHA] + (params[G] / (1.0 - params[G]) if state[NOTIFIED] else 0.0)
        )
        state[NOTIFIED] = 0.0
        state[ALPHA_SINCE] += intervals * params[ALPHA_TIME]


@compiled
def on_ack(s, lane, packet, acked):
    """Decrease on a notification, and count bytes."""
    control, now = lane_at(s, lane), s.now
    params, state = params_at(s, lane), state_at(s, lane)
    if packet_at(s, packet).marked:
        if not state[SEEN]:
            state[SEEN], state[ALPHA_SINCE], state[DECREASED] = 1.0, now, -1e18
        _update_alpha(s, lane)
        state[NOTIFIED] = 1.0
        if now - state[DECREASED] >= params[DECREASE_TIME]:
            state[TARGET] = control.rate
            control.rate = max(control.rate * (1.0 - state[ALPHA] / 2.0), params[MIN_RATE])
            state[DECREASED] = now
            state[BYTES] = state[TIMER_STEPS] = state[BYTE_STEPS] = 0.0
            state[TICK] = now + params[RATE_TIME]
            arm(s, lane, 0, state[TICK])
    if state[SEEN]:
        state[BYTES] += acked
        if state[BYTES] >= params[BYTE_COUNTER] > 0.0:
            state[BYTES] -= params[BYTE_COUNTER]
            state[BYTE_STEPS] += 1.0
            _increase(s, lane)


@compiled
def on_timer(s, lane):
    """A tick of the increase timer, unless a decrease has put it off."""
    state = state_at(s, lane)
    now = s.now
    if now >= state[TICK]:
        state[TIMER_STEPS] += 1.0
        _increase(s, lane)
        state[TICK] = now + params_at(s, lane)[RATE_TIME]
    arm(s, lane, 0, state[TICK])


@compiled
def _increase(s, lane):
    """Fast recovery, additive increase, hyper increase."""
    control, state = lane_at(s, lane), state_at(s, lane)
    params = params_at(s, lane)
    by_bytes = state[BYTE_STEPS] if params[BYTE_COUNTER] > 0.0 else state[TIMER_STEPS] - 1.0
    least, most = min(state[TIMER_STEPS], by_bytes), max(state[TIMER_STEPS], by_bytes)
    if least > params[FAST_STEPS]:
        state[TARGET] += params[R_HAI]
    elif most > params[FAST_STEPS]:
        state[TARGET] += params[R_AI]
    state[TARGET] = min(state[TARGET], params[LINE_RATE])
    control.rate = (state[TARGET] + control.rate) / 2.0
