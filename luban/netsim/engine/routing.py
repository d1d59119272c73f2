"""Where a packet goes next: along its path, over the shortest queue, or by its list of segments."""

from __future__ import annotations

from luban.netsim.compiled import compiled
from luban.netsim.engine.access import flow_at, int32_at, packet_at, path_port, path_start, queue_at
from luban.netsim.engine.layout import ADAPTIVE, CLASSES, DATA, SEGMENTS


@compiled
def next_port(s, packet, node):
    """The port over which a packet leaves `node`; acknowledgements go back the way that the data came."""
    p = packet_at(s, packet)
    if p.kind != DATA:
        return path_port(s, path_start(s, p.path + 1) - 1 - p.hop) ^ 1
    flow = flow_at(s, p.flow)
    if flow.routing == SEGMENTS:
        return _by_segment(s, flow, p, node)
    if flow.routing == ADAPTIVE:
        _take_shortest_queue(s, flow, p)
    return path_port(s, path_start(s, p.path) + p.hop)


@compiled
def _take_shortest_queue(s, flow, p):
    """Adaptive routing: of the flow's paths through the port that the packet came over, the one whose next queue is shortest."""
    hop = p.hop
    came = path_port(s, path_start(s, p.path) + hop - 1)
    least = queue_at(s, path_port(s, path_start(s, p.path) + hop) * CLASSES + p.cls).bytes
    for path in range(flow.first_path, flow.first_path + flow.paths):
        if path_port(s, path_start(s, path) + hop - 1) == came:
            queued = queue_at(s, path_port(s, path_start(s, path) + hop) * CLASSES + p.cls).bytes
            if queued < least:
                least, p.path = queued, path


@compiled
def _by_segment(s, flow, p, node):
    """Segment routing: a node that is the first of the packet's list takes itself off and sends it towards the next."""
    target = int32_at(s.segments, flow.first_segment + p.segment)
    if int32_at(s.segment_nodes, target) == node:
        p.segment += 1
        p.strip = 1
        target = int32_at(s.segments, flow.first_segment + p.segment)
    return int32_at(s.next_hops, target * s.node_count + node)
