"""The event loop."""

from __future__ import annotations

import numpy as np

from luban.netsim.compiled import cached, compiled
from luban.netsim.congestion.dispatch import cc_timer
from luban.netsim.engine.access import (
    cell_at,
    event_at,
    flow_at,
    int32_at,
    lane_at,
    node_at,
    packet_at,
    port_at,
    queue_at,
)
from luban.netsim.engine.heap import pop, push
from luban.netsim.engine.layout import (
    ARRIVE,
    CHUNK,
    CLASSES,
    COMPUTED,
    DATA,
    DELAYED_ACK,
    FINISHED,
    GROW,
    IDLE,
    PACE,
    PAUSE,
    RESUME,
    SAMPLE,
    STALLED,
    START,
    TIMER_A,
    TX,
    UNTIL,
)
from luban.netsim.engine.port import enqueue, transmit
from luban.netsim.engine.receiver import delayed, finish, first_events, received, start
from luban.netsim.engine.routing import next_port
from luban.netsim.engine.sender import acknowledged, free_packet, make_ready, timed_out, try_again
from luban.netsim.engine.switch import admit

SPARE_PACKETS = 16  # more than one event can take from the pool


@cached
def advance(world, until, most):
    """Handle events until `until` (ps), at most `most` of them; returns why it stopped: FINISHED (no flow is left), IDLE (no
    event is left), UNTIL, CHUNK (`most` were handled), GROW (the pool of packets is too small) or STALLED (nothing has reached
    a receiver for `stall_after`)."""
    s = world[0]
    if s.sequence == 0:
        first_events(s)
    for _ in range(most):
        if s.unfinished == 0:
            return FINISHED
        if s.heap_size == 0:
            return IDLE
        if event_at(s, 0).time > until:
            return UNTIL
        if s.free_count < SPARE_PACKETS:
            return GROW
        if s.now - s.last_progress > s.stall_after:
            return STALLED
        time, what = pop(s)
        s.now = time
        s.events += 1
        _handle(s, what & 15, what >> 4)
    return CHUNK


@compiled
def _handle(s, kind, argument):
    """One event. Whatever happens, one port at most can send more than before: it is tried at the end."""
    port = argument
    if kind == ARRIVE:
        port = _arrive(s, argument)
    elif kind == TX:
        port_at(s, argument).tx_pending = 0
    elif kind == SAMPLE:
        _sample(s)
        port = -1
    elif kind == COMPUTED:
        finish(s, argument)
        port = -1
    elif kind == DELAYED_ACK:
        port = delayed(s, argument)
    elif kind >= TIMER_A:
        port = _lane_timer(s, argument, kind - TIMER_A)
    else:
        port = _flow_event(s, kind, argument)
    if port >= 0:
        transmit(s, port)


@compiled
def _flow_event(s, kind, f):
    """A flow starts, its pacing lets it send, or its retransmission timer rings."""
    flow = flow_at(s, f)
    if kind == PACE:
        flow.pace_pending = 0
    elif kind == START:
        start(s, f)
    else:
        timed_out(s, f)
    if not flow.active:
        return -1
    make_ready(s, f)
    return flow.port


@compiled
def _lane_timer(s, lane, which):
    """A timer of the congestion control rings, or an ejected path is tried again."""
    lane_at(s, lane).timer_pending &= ~(1 << which)
    f = lane_at(s, lane).flow
    if not flow_at(s, f).active:
        return -1
    if which == 1:
        try_again(s, lane)
    else:
        cc_timer(s, lane)
    make_ready(s, f)
    return flow_at(s, f).port


@compiled
def _arrive(s, index):
    """The packet at the head of a wire reaches the node at its far end; returns the port that may have to send now."""
    port = port_at(s, index)
    packet = port.pipe_head
    p = packet_at(s, packet)
    port.pipe_head = p.next
    if port.pipe_head < 0:
        port.pipe_tail = -1
    else:
        push(s, packet_at(s, port.pipe_head).arrive, ARRIVE, index)
    s.hops += 1
    # The ends of a failed link agree on pauses and credits when it works again, so control frames count while it is down.
    if port.down and p.kind < PAUSE:
        return _drop_on_failed_link(s, index, packet)
    if p.kind >= PAUSE:
        _control(s, index ^ 1, p.kind, p.seq, p.cumulative)
        free_packet(s, packet)
        return index ^ 1
    if not node_at(s, port.peer).is_switch:
        if p.kind != DATA:
            out = flow_at(s, p.flow).port
            acknowledged(s, packet)
            return out
        if not received(s, packet, port.peer):
            return -1
    out = next_port(s, packet, port.peer)
    if node_at(s, port.peer).is_switch and not admit(s, packet, index, out):
        port_at(s, out).drops += 1
        free_packet(s, packet)
        return -1
    enqueue(s, out, packet)
    return out


@compiled
def _drop_on_failed_link(s, index, packet):
    """The packet is lost, and the buffer at the far end that was promised to it is free: its credit is the sender's again."""
    port, p = port_at(s, index), packet_at(s, packet)
    port.drops += 1
    if p.cls > 0:
        queue_at(s, index * CLASSES + p.cls).credits += p.size
    free_packet(s, packet)
    return index


@compiled
def _control(s, index, kind, cls, amount):
    """PAUSE, RESUME or credit has reached the sender of port `index`."""
    port, now = port_at(s, index), s.now
    if kind == PAUSE:
        if port.paused == 0:
            port.paused_since = now
        port.paused |= 1 << cls
        port.pauses += 1
    elif kind == RESUME:
        port.paused &= ~(1 << cls)
        if port.paused == 0:
            port.paused_time += now - port.paused_since
    else:
        queue_at(s, index * CLASSES + cls).credits += amount


@compiled
def _sample(s):
    """Write down the watched queues and flows. When the arrays are full every second sample goes, and the interval doubles."""
    ports, flows = s.watched_port_count, s.watched_flow_count
    if s.samples == s.most_samples:
        half = s.samples // 2
        for i in range(half):
            cell_at(s.sample_times, i).value = cell_at(s.sample_times, 2 * i).value
            for j in range(2 * ports):
                cell_at(s.port_samples, i * 2 * ports + j).value = cell_at(s.port_samples, 4 * i * ports + j).value
            for j in range(flows):
                cell_at(s.flow_samples, i * flows + j).value = cell_at(s.flow_samples, 2 * i * flows + j).value
        s.samples = half
        s.sample_every *= 2
    i = np.int64(s.samples)
    cell_at(s.sample_times, i).value = s.now
    for j in range(ports):
        port = int32_at(s.watched_ports, j)
        queued = 0
        for cls in range(CLASSES):
            queued += queue_at(s, port * CLASSES + cls).bytes
        cell_at(s.port_samples, 2 * (i * ports + j)).value = queued
        cell_at(s.port_samples, 2 * (i * ports + j) + 1).value = port_at(s, port).tx_bytes
    for j in range(flows):
        cell_at(s.flow_samples, i * flows + j).value = flow_at(s, int32_at(s.watched_flows, j)).received
    s.samples += 1
    push(s, s.now + s.sample_every, SAMPLE, 0)
