"""Senders: which flow of a host sends next, windows and pacing, retransmission, what an acknowledgement changes."""

from __future__ import annotations

from luban.netsim.compiled import compiled
from luban.netsim.congestion.dispatch import cc_ack, cc_loss, cc_send, cc_timeout
from luban.netsim.congestion.timers import arm
from luban.netsim.engine.access import acked_at, flow_at, lane_at, packet_at, port_at, queue_at
from luban.netsim.engine.heap import push, random_below
from luban.netsim.engine.layout import (
    ACKED,
    ADAPTIVE,
    BY_LANE,
    CLASSES,
    DATA,
    LOST,
    NACK,
    NEWRENO,
    ON_LANE,
    PACE,
    ROUND_ROBIN,
    RTO,
    SEGMENTS,
    SELECTIVE,
    SPRAY,
)

DUPLICATES = 3  # acknowledgements that make a packet count as lost
MAX_BACKOFF = 6  # doublings of the retransmission timeout
EJECT_AFTER = 2  # timeouts in a row after which a path is no longer used


@compiled
def payload_of(s, flow, seq):
    """Bytes of data in packet `seq`."""
    full = s.payload
    return min(full, flow.size - seq * full)


@compiled
def free_packet(s, packet):
    """Put a packet back into the list of free ones."""
    packet_at(s, packet).next = s.free_head
    s.free_head = packet
    s.free_count += 1


@compiled
def make_ready(s, f):
    """Put a flow into its port's list if it may send now; if pacing forbids it until later, set an alarm for then."""
    flow = flow_at(s, f)
    if flow.ready or not flow.active or _next_seq(s, flow) < 0:
        return
    lane, when = _open_lane(s, flow)
    if lane < 0:
        return
    if when > s.now:
        if not flow.pace_pending:
            flow.pace_pending = 1
            push(s, when, PACE, f)
        return
    queue = queue_at(s, flow.port * CLASSES + flow.cls)
    flow.ready, flow.next_ready = 1, -1
    if queue.ready_head < 0:
        queue.ready_head = f
    else:
        flow_at(s, queue.ready_tail).next_ready = f
    queue.ready_tail = f
    port_at(s, flow.port).waiting += 1


@compiled
def _next_seq(s, flow):
    """The packet that the flow would send next: a lost one first; -1: nothing is left to be sent."""
    if flow.needs_rtx:
        return flow.una
    if flow.recovery == SELECTIVE:
        seq = max(flow.rtx_next, flow.una)
        while seq < flow.lost_below and acked_at(s, flow, seq).value != LOST:
            seq += 1
        flow.rtx_next = seq
        if seq < flow.lost_below:
            return seq
    return flow.next_seq if flow.next_seq < flow.packets else -1


@compiled
def _open_lane(s, flow):
    """A lane whose window lets another packet go, the one with the earliest time to send, and that time; -1: none."""
    best, when = -1, 0
    size = s.payload
    for offset in range(flow.lanes):
        index = flow.first_lane + (flow.turn + offset) % flow.lanes
        lane = lane_at(s, index)
        closed = lane.in_flight > 0 and lane.in_flight + size > lane.window
        if lane.ejected or (closed and not flow.needs_rtx):
            continue
        if best < 0 or lane.next_send < when:
            best, when = index, lane.next_send
    return best, when


@compiled
def next_from_flows(s, index, cls):
    """A data packet of the next flow in the list of (port, class); -1: none may send."""
    queue = queue_at(s, index * CLASSES + cls)
    while queue.ready_head >= 0:
        f = queue.ready_head
        flow = flow_at(s, f)
        queue.ready_head = flow.next_ready
        if queue.ready_head < 0:
            queue.ready_tail = -1
        flow.ready = 0
        port_at(s, index).waiting -= 1
        seq = _next_seq(s, flow)
        if seq < 0:
            continue
        lane, when = _open_lane(s, flow)
        if lane >= 0 and when <= s.now:
            packet = _build(s, f, lane, seq)
            make_ready(s, f)
            return packet
        make_ready(s, f)
    return -1


@compiled
def _build(s, f, lane_index, seq):
    """Make the data packet `seq` and count it as sent."""
    flow, lane = flow_at(s, f), lane_at(s, lane_index)
    packet = s.free_head
    p = packet_at(s, packet)
    s.free_head = p.next
    s.free_count -= 1
    data = payload_of(s, flow, seq)
    p.kind, p.cls, p.flow, p.lane, p.seq, p.size = DATA, flow.cls, f, lane_index, seq, data + s.header
    p.hop, p.hops, p.marked, p.ingress, p.in_headroom, p.segment, p.strip = 0, 0, 0, -1, 0, 0, 0
    if flow.routing == SEGMENTS:
        p.size += s.segment_base + flow.segments * s.segment_bytes
    p.sent, p.util, p.weight, p.window = s.now, 0.0, 0, 0
    p.path = _path(s, flow, lane)
    if seq >= flow.max_seq:
        cc_send(s, lane_index, packet, seq == flow.packets - 1)
        flow.max_seq = seq + 1
    else:
        flow.retransmits += 1
    if flow.needs_rtx:
        flow.needs_rtx = 0
    elif seq < flow.next_seq:
        flow.rtx_next = seq + 1
    else:
        flow.next_seq = seq + 1
    flow.turn += 1
    if flow.recovery == SELECTIVE:
        if lane.in_flight == 0.0:
            lane.last_ack = s.now
        lane.in_flight += data
        acked_at(s, flow, seq).value = ON_LANE + lane_index - flow.first_lane
    else:
        _count_in_flight(s, flow)
    if lane.rate > 0.0:
        lane.next_send = max(s.now, lane.next_send) + int(p.size / lane.rate)
    if not flow.rto_pending:
        flow.rto_deadline = s.now + _timeout(flow)
        flow.rto_pending = 1
        push(s, flow.rto_deadline, RTO, f)
    return packet


@compiled
def _path(s, flow, lane):
    if flow.routing in (SPRAY, ADAPTIVE):
        return flow.first_path + random_below(s, flow.paths)
    if flow.routing == ROUND_ROBIN:
        return flow.first_path + flow.turn % flow.paths
    if flow.routing == BY_LANE:
        return lane.path
    return flow.first_path


@compiled
def _count_in_flight(s, flow):
    lane_at(s, flow.first_lane).in_flight = max(0, flow.next_seq - flow.una - flow.dup_acks) * s.payload


@compiled
def _timeout(flow):
    """Retransmission timeout in ps, RFC 6298 with the flow's minimum."""
    return int(max(flow.srtt + 4.0 * flow.rttvar, flow.rto_min)) << min(flow.backoff, MAX_BACKOFF)


@compiled
def acknowledged(s, packet):
    """An acknowledgement has come back to the sender; the packet is freed."""
    p = packet_at(s, packet)
    flow = flow_at(s, p.flow)
    lane = lane_at(s, p.lane)
    if not flow.active:
        free_packet(s, packet)
        return
    lane.rtt = s.now - p.sent
    lane.last_ack, lane.timeouts = s.now, 0
    _sample_rtt(flow, lane.rtt)
    if p.kind == NACK:
        _go_back(s, flow, p.cumulative)
        cc_loss(s, p.lane)
    else:
        acked = _selective(s, flow, p) if flow.recovery == SELECTIVE else _cumulative(s, flow, p)
        cc_ack(s, p.lane, packet, acked)
    if flow.una >= flow.packets:
        flow.active = 0
    f = p.flow
    free_packet(s, packet)
    make_ready(s, f)


@compiled
def _sample_rtt(flow, rtt):
    if flow.srtt == 0.0:
        flow.srtt, flow.rttvar = rtt, rtt / 2.0
    else:
        flow.rttvar += (abs(flow.srtt - rtt) - flow.rttvar) / 4.0
        flow.srtt += (rtt - flow.srtt) / 8.0


@compiled
def _progress(s, flow):
    """New packets were acknowledged: the timeout starts anew."""
    flow.backoff = 0
    flow.rto_deadline = s.now + _timeout(flow)


@compiled
def _go_back(s, flow, cumulative):
    """Go-back-N: send everything from packet `cumulative` on again."""
    if cumulative > flow.una:
        flow.una = cumulative
        _progress(s, flow)
    flow.next_seq = flow.una
    flow.dup_acks = 0
    _count_in_flight(s, flow)


@compiled
def _cumulative(s, flow, p):
    """Go-back-N and NewReno (RFC 6582): returns the bytes that are newly acknowledged."""
    before = flow.una
    if p.cumulative > flow.una:
        flow.una = p.cumulative
        flow.next_seq = max(flow.next_seq, flow.una)
        flow.dup_acks = 0
        _progress(s, flow)
        if flow.recover >= 0:
            if flow.una >= flow.recover:
                flow.recover = -1
            else:  # the next hole
                flow.needs_rtx = 1
    elif flow.recovery == NEWRENO and p.cumulative == flow.una and flow.next_seq > flow.una:
        flow.dup_acks += 1
        if flow.dup_acks == DUPLICATES and flow.recover < 0 and flow.una >= flow.no_fast_below:
            flow.recover = flow.max_seq
            flow.needs_rtx = 1
            flow.fast_recoveries += 1
            cc_loss(s, p.lane)
    _count_in_flight(s, flow)
    return min(flow.una * s.payload, flow.size) - before * s.payload if flow.una > before else 0


@compiled
def _selective(s, flow, p):
    """Every packet acknowledged by itself: returns the bytes that are newly acknowledged."""
    acked = 0
    state = acked_at(s, flow, p.seq)
    if state.value != ACKED:
        acked = payload_of(s, flow, p.seq)
        if state.value >= ON_LANE:
            lane = lane_at(s, flow.first_lane + state.value - ON_LANE)
            lane.in_flight = max(0.0, lane.in_flight - acked)
        state.value = ACKED
        _progress(s, flow)
    flow.una = max(flow.una, p.cumulative)
    if _lose(s, flow, flow.lost_below, p.seq - flow.reorder + 1, -1) and flow.una >= flow.recover:  # once a window
        flow.recover = flow.max_seq
        flow.fast_recoveries += 1
        cc_loss(s, p.lane)
    return acked


@compiled
def _lose(s, flow, first, below, lane):
    """Of the packets from `first` to `below` those that are on the way, by one lane (-1: by any), count as lost; returns how many."""
    lost = 0
    for seq in range(max(first, flow.una), below):
        state = acked_at(s, flow, seq)
        if state.value >= ON_LANE and (lane < 0 or state.value == ON_LANE + lane):
            control = lane_at(s, flow.first_lane + state.value - ON_LANE)
            control.in_flight = max(0.0, control.in_flight - payload_of(s, flow, seq))
            state.value = LOST
            flow.rtx_next = min(flow.rtx_next, seq)
            flow.lost_below = max(flow.lost_below, seq + 1)
            lost += 1
    if lane < 0:
        flow.lost_below = max(flow.lost_below, below)
    return lost


@compiled
def timed_out(s, f):
    """The retransmission timer of a flow has rung: nothing was acknowledged for a whole timeout, or the deadline has moved."""
    flow = flow_at(s, f)
    flow.rto_pending = 0
    if not flow.active:
        return
    if flow.una < flow.max_seq:
        if s.now >= flow.rto_deadline:
            flow.timeouts += 1
            flow.backoff += 1
            flow.dup_acks, flow.recover, flow.needs_rtx = 0, -1, 0
            flow.no_fast_below = flow.max_seq
            if flow.recovery == SELECTIVE:
                _lanes_timed_out(s, flow, 0)
            else:
                flow.next_seq = flow.una
                _count_in_flight(s, flow)
                cc_timeout(s, flow.first_lane)
            flow.rto_deadline = s.now + _timeout(flow)
        elif flow.lanes > 1:
            _lanes_timed_out(s, flow, _timeout(flow))
        flow.rto_pending = 1
        push(s, flow.rto_deadline, RTO, f)


@compiled
def _lanes_timed_out(s, flow, silent):
    """Packets on paths that have answered nothing for `silent` ps count as lost; a path that has not answered several times in a
    row is ejected while others are left, and tried again later if the transport says so."""
    left = 0
    for offset in range(flow.lanes):
        index = flow.first_lane + offset
        lane = lane_at(s, index)
        if lane.in_flight > 0.0 and s.now - lane.last_ack >= silent:
            _lose(s, flow, flow.una, flow.max_seq, offset)
            lane.timeouts += 1
            lane.in_flight = 0.0
            cc_timeout(s, index)
        left += not lane.ejected
    for index in range(flow.first_lane, flow.first_lane + flow.lanes):
        lane = lane_at(s, index)
        if lane.timeouts >= EJECT_AFTER and not lane.ejected and left > 1:
            lane.ejected = 1
            left -= 1
            if s.probe_gap > 0:
                arm(s, index, 1, s.now + s.probe_gap)


@compiled
def try_again(s, index):
    """One packet goes over an ejected path: its answer takes the path back into use, another timeout ejects it again."""
    lane = lane_at(s, index)
    lane.ejected, lane.timeouts, lane.window = 0, EJECT_AFTER - 1, float(s.payload)
