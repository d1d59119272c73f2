"""Which algorithm's function is called: integers, since compiled code has no objects."""

from __future__ import annotations

from luban.netsim.compiled import compiled
from luban.netsim.congestion import constant, dcqcn, dctcp, hpcc, newreno, pint, swift, timely, ufab
from luban.netsim.congestion.parameters import CONSTANT, DCQCN, DCTCP, HPCC, NEWRENO, PINT, SWIFT, TIMELY, UFAB
from luban.netsim.engine.access import flow_at, lane_at, packet_at


@compiled
def _algorithm(s, lane):
    return flow_at(s, lane_at(s, lane).flow).cc


@compiled
def cc_start(s, lane):
    """A flow starts."""
    code = _algorithm(s, lane)
    if code == CONSTANT:
        constant.start(s, lane)
    elif code == NEWRENO:
        newreno.start(s, lane)
    elif code == DCTCP:
        dctcp.start(s, lane)
    elif code == DCQCN:
        dcqcn.start(s, lane)
    elif code == TIMELY:
        timely.start(s, lane)
    elif code in (HPCC, PINT):
        hpcc.start(s, lane)
    elif code == SWIFT:
        swift.start(s, lane)
    elif code == UFAB:
        ufab.start(s, lane)
    else:
        raise ValueError("no congestion control has this code")


@compiled
def cc_ack(s, lane, packet, acked):
    """An acknowledgement: `packet` carries the echoed mark and telemetry, `acked` bytes are newly acknowledged."""
    code = _algorithm(s, lane)
    if code == NEWRENO:
        newreno.on_ack(s, lane, acked)
    elif code == DCTCP:
        dctcp.on_ack(s, lane, packet, acked)
    elif code == DCQCN:
        dcqcn.on_ack(s, lane, packet, acked)
    elif code == TIMELY:
        timely.on_ack(s, lane, acked)
    elif code == HPCC:
        hpcc.on_ack(s, lane, packet)
    elif code == PINT:
        pint.on_ack(s, lane, packet)
    elif code == SWIFT:
        swift.on_ack(s, lane, acked)
    elif code == UFAB:
        ufab.on_ack(s, lane, packet)


@compiled
def cc_send(s, lane, packet, last):
    """A packet is made: what it tells the switches."""
    if _algorithm(s, lane) == UFAB:
        ufab.register(s, lane, packet_at(s, packet), last)


@compiled
def cc_loss(s, lane):
    """A lost packet was noticed without a timeout, at most once a window."""
    code = _algorithm(s, lane)
    if code in (NEWRENO, DCTCP):
        newreno.on_loss(s, lane)
    elif code == SWIFT:
        swift.on_loss(s, lane)


@compiled
def cc_timeout(s, lane):
    """Nothing was acknowledged for a whole timeout."""
    code = _algorithm(s, lane)
    if code in (NEWRENO, DCTCP):
        newreno.on_timeout(s, lane)
    elif code == SWIFT:
        swift.on_timeout(s, lane)
    elif code == UFAB:
        ufab.on_timeout(s, lane)


@compiled
def cc_timer(s, lane):
    """A timer that the algorithm has set."""
    if _algorithm(s, lane) == DCQCN:
        dcqcn.on_timer(s, lane)
