"""Receivers: what has arrived, acknowledgements, the end of a flow, and the start of those that depend on it."""

from __future__ import annotations

from luban.netsim.compiled import compiled
from luban.netsim.congestion.dispatch import cc_start
from luban.netsim.engine.access import arrived_at, dependent, flow_at, packet_at, port_at
from luban.netsim.engine.heap import push
from luban.netsim.engine.layout import ACK, COMPUTED, DELAYED_ACK, GO_BACK_N, NACK, SAMPLE, START
from luban.netsim.engine.port import enqueue
from luban.netsim.engine.routing import next_port
from luban.netsim.engine.sender import free_packet, payload_of


@compiled
def received(s, packet, node):
    """A data packet has reached its host `node`: it becomes its own acknowledgement. False: it is answered later or not at all."""
    p = packet_at(s, packet)
    flow = flow_at(s, p.flow)
    s.delivered += 1
    s.last_progress = s.now
    kind = ACK
    if not arrived_at(s, flow, p.seq).value:
        if flow.recovery != GO_BACK_N or p.seq == flow.expected:
            _take(s, p.flow, p.seq)
        elif flow.last_nack == flow.expected:
            free_packet(s, packet)
            return False
        else:
            kind = NACK
            flow.last_nack = flow.expected
    p.kind, p.cumulative, p.size, p.cls = kind, flow.expected, s.ack_size, s.ack_class
    p.hop, p.ingress = 0, -1
    if flow.cnp_gap and p.marked:
        if s.now - flow.last_cnp >= flow.cnp_gap:
            flow.last_cnp = s.now
        else:
            p.marked = 0
    return s.ack_every == 1 or _answers_now(s, packet, node)


@compiled
def _answers_now(s, packet, node):
    """Delayed acknowledgements: whether this one is sent at once. If it waits, it lies in `flow.held`. As RFC 8257 has it, a
    change of the marks sends the one that waits first, with the mark that it has."""
    p = packet_at(s, packet)
    flow = flow_at(s, p.flow)
    if flow.held >= 0 and p.marked != flow.last_mark:
        enqueue(s, next_port(s, flow.held, node), flow.held)
        flow.held, flow.unanswered = -1, 0
    flow.last_mark = p.marked
    flow.unanswered += 1
    if flow.held >= 0:
        free_packet(s, flow.held)
        flow.held = -1
    in_order = p.kind == ACK and flow.arrived == flow.expected and p.seq == flow.expected - 1
    if flow.unanswered >= s.ack_every or not in_order or flow.arrived == flow.packets:
        flow.unanswered = 0
        return True
    flow.held, flow.held_since = packet, s.now
    if not flow.ack_pending:
        flow.ack_pending = 1
        push(s, s.now + s.ack_delay, DELAYED_ACK, p.flow)
    return False


@compiled
def delayed(s, f):
    """The time of a delayed acknowledgement: returns the port that it leaves by; -1: none waits, or not so long yet."""
    flow = flow_at(s, f)
    flow.ack_pending = 0
    if flow.held < 0:
        return -1
    due = flow.held_since + s.ack_delay
    if due > s.now:
        flow.ack_pending = 1
        push(s, due, DELAYED_ACK, f)
        return -1
    packet = flow.held
    flow.held, flow.unanswered = -1, 0
    out = next_port(s, packet, port_at(s, flow.port).node)
    enqueue(s, out, packet)
    return out


@compiled
def _take(s, f, seq):
    """Count a packet that has arrived for the first time."""
    flow = flow_at(s, f)
    arrived_at(s, flow, seq).value = 1
    flow.arrived += 1
    flow.received += payload_of(s, flow, seq)
    while flow.expected < flow.packets and arrived_at(s, flow, flow.expected).value:
        flow.expected += 1
    if flow.arrived == flow.packets and flow.finish < 0:
        finish(s, f)


@compiled
def finish(s, f):
    """A flow has arrived whole, or work is done: what waits for it may start."""
    flow = flow_at(s, f)
    flow.finish = s.now
    s.unfinished -= 1
    s.last_progress = s.now
    for i in range(flow.first_dependent, flow.first_dependent + flow.dependents):
        waiting = flow_at(s, dependent(s, i))
        waiting.waits_for -= 1
        if waiting.waits_for == 0:
            push(s, s.now + waiting.start, START, dependent(s, i))


@compiled
def first_events(s):
    """The start of all flows that wait for nothing, and the first sample."""
    for f in range(s.flow_count):
        if flow_at(s, f).waits_for == 0:
            push(s, flow_at(s, f).start, START, f)
    if s.sample_every:
        push(s, 0, SAMPLE, 0)


@compiled
def start(s, f):
    """Start a flow, or work that sends nothing."""
    flow = flow_at(s, f)
    flow.began = s.now
    s.last_progress = s.now
    if flow.packets == 0:
        push(s, s.now + flow.duration, COMPUTED, f)
        return
    flow.active = 1
    for lane in range(flow.first_lane, flow.first_lane + flow.lanes):
        cc_start(s, lane)
