"""PINT (Ben Basat et al. 2020) carrying HPCC's utilisation in one small number a packet.

The switch keeps the moving average of its own utilisation: U ← (T − dt)/T·U + q·dt/(B·T²) + bytes/(B·T). A packet keeps the
largest along its path, as the logarithm to base (1 + epsilon)², rounded up or down at random so that its mean is right. A share p
of the packets carries it; the others change nothing at the sender.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from luban.netsim.compiled import compiled
from luban.netsim.congestion.hpcc import UPDATED, UTIL, Hpcc, set_window
from luban.netsim.congestion.parameters import BYTES_A_PS, FIRST, PINT
from luban.netsim.engine.access import lane_at, packet_at, params_at, state_at
from luban.netsim.engine.heap import random_unit

SHARE = FIRST + 3  # after HPCC's own
EPSILON = 0.025
STEP = 2.0 * math.log(1.0 + EPSILON)  # between two codes
SMALLEST = 1e-4  # utilisation of code 0
CODES = 256  # that one byte can hold


@dataclass(frozen=True, kw_only=True)
class Pint(Hpcc):
    """HPCC over PINT."""

    code: ClassVar[int] = PINT
    telemetry: ClassVar[int] = 2

    header: int = 50  # bytes of headers a data packet, two of telemetry included
    share: float = 1.0  # of the packets that carry the utilisation

    def own_parameters(self, rate: float, base_rtt: float) -> list[float]:
        """HPCC's and the share."""
        return [*super().own_parameters(rate, base_rtt), self.share]


@compiled
def encode_utilisation(s, port, p, queued):
    """Update a port's utilisation as packet `p` leaves it, and the largest code that the packet has met."""
    period = float(s.base_rtt)
    passed = min(float(s.now - port.util_time), period)
    capacity = port.rate * BYTES_A_PS * period
    port.util = (period - passed) / period * port.util + queued * passed / (capacity * period) + p.size / capacity
    port.util_time = s.now
    exact = math.log(max(port.util, SMALLEST) / SMALLEST) / STEP
    code = math.floor(exact)
    if random_unit(s) < exact - code:
        code += 1
    p.util = max(p.util, min(code, CODES - 1))
    p.hops = 1


@compiled
def decode(code):
    """The utilisation that a code stands for."""
    return SMALLEST * math.exp(code * STEP)


@compiled
def on_ack(s, lane, packet):
    """HPCC's window from the packet's number, where it carries one."""
    p, control, state = packet_at(s, packet), lane_at(s, lane), state_at(s, lane)
    params = params_at(s, lane)
    if p.hops == 0 or random_unit(s) >= params[SHARE]:
        return
    state[UTIL] = decode(p.util)
    new_round = p.sent >= state[UPDATED]
    set_window(control, state, params, new_round)
    if new_round:
        state[UPDATED] = s.now
