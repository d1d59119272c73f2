"""DCTCP (Alizadeh et al. 2010; RFC 8257): the window shrinks by the share of bytes that were marked.

Once a window: alpha ← (1 − g)·alpha + g·F with F the marked share of the bytes acknowledged in it. After a mark, once a window:
window ← window·(1 − alpha/2). Otherwise NewReno.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luban.netsim.compiled import compiled
from luban.netsim.congestion import newreno
from luban.netsim.congestion.newreno import NewReno
from luban.netsim.congestion.parameters import DCTCP, FIRST, MSS
from luban.netsim.engine.access import flow_at, lane_at, packet_at, params_at, state_at

G, ALPHA_START, LEAST = FIRST + 2, FIRST + 3, FIRST + 4  # after NewReno's own
SSTHRESH, ALPHA, ACKED, MARKED, ALPHA_UNTIL, REDUCED_UNTIL = range(6)  # state; the last two are packet numbers


@dataclass(frozen=True, kw_only=True)
class Dctcp(NewReno):
    """DCTCP."""

    code: ClassVar[int] = DCTCP

    rto_us: float = 10_000.0  # smallest retransmission timeout, microseconds
    g: float = 1 / 16  # weight of the newest window in alpha
    alpha_start: float = 1.0  # alpha before the first window has ended
    least_window: float = 1.0  # packets that marks leave of a window at least

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """NewReno's, g, the first alpha, the least window."""
        return [*super().own_parameters(rate, base_rtt), self.g, self.alpha_start, self.least_window]

    def marks(self, rate: int) -> tuple[float, float, float]:
        """One threshold: 3 kB for each Gb/s."""
        return 3.0 * rate, 3.0 * rate, 1.0


@compiled
def start(s, lane):
    """NewReno's start, and nothing marked so far."""
    newreno.start(s, lane)
    state_at(s, lane)[ALPHA] = params_at(s, lane)[ALPHA_START]
    state_at(s, lane)[ACKED] = state_at(s, lane)[MARKED] = state_at(s, lane)[ALPHA_UNTIL] = 0.0
    state_at(s, lane)[REDUCED_UNTIL] = -1.0


@compiled
def on_ack(s, lane, packet, acked):
    """Count marks; shrink once a window in which there were some, grow where there were none."""
    control, state = lane_at(s, lane), state_at(s, lane)
    flow = flow_at(s, control.flow)
    params = params_at(s, lane)
    marked = packet_at(s, packet).marked
    state[ACKED] += acked
    state[MARKED] += acked * marked
    if flow.una >= state[ALPHA_UNTIL] and state[ACKED] > 0.0:
        state[ALPHA] += params[G] * (state[MARKED] / state[ACKED] - state[ALPHA])
        state[ACKED], state[MARKED], state[ALPHA_UNTIL] = 0.0, 0.0, flow.next_seq
    if marked and flow.una >= state[REDUCED_UNTIL] and flow.una >= flow.recover:
        control.window = max(control.window * (1.0 - state[ALPHA] / 2.0), params[LEAST] * params[MSS])
        state[SSTHRESH] = control.window
        state[REDUCED_UNTIL] = flow.next_seq
    elif flow.una >= state[REDUCED_UNTIL]:
        newreno.on_ack(s, lane, acked)
