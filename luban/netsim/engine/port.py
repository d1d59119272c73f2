"""Ports: egress queues by class, what is sent next, and what a switch writes into a packet as it leaves."""

from __future__ import annotations

from luban.netsim.compiled import compiled
from luban.netsim.congestion.pint import encode_utilisation
from luban.netsim.engine.access import flow_at, node_at, packet_at, port_at, queue_at, telemetry_at
from luban.netsim.engine.heap import push, random_unit
from luban.netsim.engine.layout import (
    ARRIVE,
    CLASSES,
    DATA,
    HOPS,
    INT_BYTES,
    INT_QUEUE,
    INT_RATE,
    INT_TIME,
    INT_WEIGHT,
    INT_WINDOW,
    TX,
)
from luban.netsim.engine.sender import next_from_flows
from luban.netsim.engine.switch import release

PINT_TELEMETRY = 2  # flow.telemetry: one compressed number instead of a record a hop


@compiled
def serialisation(size, rate):
    """Time (ps) that `size` bytes take at `rate` Mb/s."""
    return size * 8_000_000 // rate


@compiled
def enqueue(s, index, packet):
    """Append a packet to the egress queue of its class."""
    p, port = packet_at(s, packet), port_at(s, index)
    queue = queue_at(s, index * CLASSES + p.cls)
    p.next = -1
    if queue.head < 0:
        queue.head = packet
    else:
        packet_at(s, queue.tail).next = packet
    queue.tail = packet
    port.waiting += 1
    if s.mark_at_enqueue:
        _mark(s, port, p, queue.bytes)
    queue.bytes += p.size
    port.max_queue = max(port.max_queue, queue.bytes)


@compiled
def transmit(s, index):
    """Start sending if the port is free and something may be sent; else see to it that it is tried again."""
    port = port_at(s, index)
    if s.now < port.busy_until:
        if not port.tx_pending:
            port.tx_pending = 1
            push(s, port.busy_until, TX, index)
        return
    packet = _choose(s, index)
    if packet < 0:
        return
    p = packet_at(s, packet)
    p.hop += 1
    port.busy_until = s.now + serialisation(p.size, port.rate)
    port.tx_bytes += p.size
    p.arrive = port.busy_until + port.delay
    p.next = -1
    if port.pipe_head < 0:
        port.pipe_head = packet
        push(s, p.arrive, ARRIVE, index)
    else:
        packet_at(s, port.pipe_tail).next = packet
    port.pipe_tail = packet
    if port.waiting > 0 and not port.tx_pending:
        port.tx_pending = 1
        push(s, port.busy_until, TX, index)


@compiled
def _choose(s, index):
    """Take the packet that is sent next: class 0 first, the others by deficit round robin; -1: none may be sent."""
    port = port_at(s, index)
    if queue_at(s, index * CLASSES).head >= 0:
        return _leave(s, index, 0)
    for _ in range(3 * CLASSES):
        cls = port.next_class
        queue = queue_at(s, index * CLASSES + cls)
        waiting = queue.head >= 0 or queue.ready_head >= 0
        if waiting and not port.paused & (1 << cls) and queue.credits >= s.payload + s.header:
            if queue.deficit > 0:
                packet = _leave(s, index, cls) if queue.head >= 0 else next_from_flows(s, index, cls)
                if packet >= 0:
                    queue.deficit -= packet_at(s, packet).size
                    queue.credits -= packet_at(s, packet).size
                    return packet
            else:
                queue.deficit += queue.quantum
        else:
            queue.deficit = 0
        port.next_class = cls + 1 if cls + 1 < CLASSES else 1
    return -1


@compiled
def _leave(s, index, cls):
    """Take the head of an egress queue; where the node is a switch of the network, mark it, write telemetry and free its buffer."""
    port, queue = port_at(s, index), queue_at(s, index * CLASSES + cls)
    packet = queue.head
    p = packet_at(s, packet)
    queue.head = p.next
    if queue.head < 0:
        queue.tail = -1
    queue.bytes -= p.size
    port.waiting -= 1
    if p.kind == DATA and node_at(s, port.node).reports:
        if not s.mark_at_enqueue:
            _mark(s, port, p, queue.bytes)
        telemetry = flow_at(s, p.flow).telemetry
        if telemetry == PINT_TELEMETRY:
            encode_utilisation(s, port, p, queue.bytes)
        elif telemetry:
            _write_telemetry(s, port, packet, queue.bytes)
    if p.ingress >= 0:
        release(s, packet)
    if p.strip:
        p.strip = 0
        p.size -= s.segment_bytes
    return packet


@compiled
def _mark(s, port, p, queued):
    """ECN by the queue's length: none below the lower bound, all above the upper, a growing share between them."""
    if p.kind != DATA or port.mark_high == 0 or queued <= port.mark_low:
        return
    if queued < port.mark_high:
        share = port.mark_share * (queued - port.mark_low) / (port.mark_high - port.mark_low)
        if random_unit(s) >= share:
            return
    p.marked = 1
    port.marks += 1


@compiled
def _write_telemetry(s, port, packet, queued):
    """One record of in-band telemetry, as HPCC and µFAB read it."""
    p = packet_at(s, packet)
    port.weight += p.weight
    port.window += p.window
    if p.hops >= HOPS:
        return
    record = telemetry_at(s, packet)[p.hops]
    record[INT_TIME], record[INT_BYTES] = s.now, port.tx_bytes
    record[INT_QUEUE], record[INT_RATE] = queued, port.rate
    record[INT_WEIGHT], record[INT_WINDOW] = port.weight, port.window
    p.hops += 1
