"""TCP NewReno: slow start, congestion avoidance, fast recovery (RFC 5681, RFC 6582)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luban.netsim.compiled import compiled
from luban.netsim.congestion.base import Recovery, Transport
from luban.netsim.congestion.parameters import FIRST, MSS, NEWRENO
from luban.netsim.engine.access import flow_at, lane_at, params_at, state_at

INITIAL_WINDOW, RECEIVE_WINDOW = FIRST, FIRST + 1
SSTHRESH = 0  # state
NO_LIMIT = 1 << 60  # bytes


@dataclass(frozen=True, kw_only=True)
class NewReno(Transport):
    """TCP NewReno."""

    code: ClassVar[int] = NEWRENO

    payload: int = 1448  # bytes of data a packet
    header: int = 52  # IP and TCP with time stamps
    recovery: Recovery = "newreno"  # of lost packets
    rto_us: float = 300_000.0  # smallest retransmission timeout, microseconds
    initial_window: float = 10.0  # packets
    receive_window: int = 0  # bytes that a receiver takes before it has acknowledged them; 0: any

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """The initial window in packets, the receiver's in bytes."""
        return [self.initial_window, float(self.receive_window or NO_LIMIT)]


@compiled
def start(s, lane):
    """Slow start from the initial window."""
    params = params_at(s, lane)
    lane_at(s, lane).window = min(params[INITIAL_WINDOW] * params[MSS], params[RECEIVE_WINDOW])
    state_at(s, lane)[SSTHRESH] = 1e18


@compiled
def grow(s, lane, acked):
    """Double the window each round trip below ssthresh, add one packet each round trip above."""
    control, _flow = lane_at(s, lane), flow_at(s, lane_at(s, lane).flow)
    mss = params_at(s, lane)[MSS]
    if control.window < state_at(s, lane)[SSTHRESH]:
        control.window += min(acked, 2.0 * mss)
    else:
        control.window += mss * acked / control.window
    control.window = min(control.window, params_at(s, lane)[RECEIVE_WINDOW])


@compiled
def on_ack(s, lane, acked):
    """Grow, but not in recovery."""
    flow = flow_at(s, lane_at(s, lane).flow)
    if acked > 0 and flow.una >= flow.recover:
        grow(s, lane, acked)


@compiled
def halve(s, lane):
    """ssthresh after a loss: half of what is in flight."""
    flow = flow_at(s, lane_at(s, lane).flow)
    mss = params_at(s, lane)[MSS]
    state_at(s, lane)[SSTHRESH] = max((flow.max_seq - flow.una) * mss / 2.0, 2.0 * mss)


@compiled
def on_loss(s, lane):
    """Fast recovery."""
    halve(s, lane)
    lane_at(s, lane).window = state_at(s, lane)[SSTHRESH]


@compiled
def on_timeout(s, lane):
    """Slow start again, from one packet."""
    halve(s, lane)
    lane_at(s, lane).window = params_at(s, lane)[MSS]
