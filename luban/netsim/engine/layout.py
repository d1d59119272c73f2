"""The arrays that the event loop works on: one record a link direction, queue, node, packet, flow and lane.

A *port* is one direction of a link together with the egress queues in front of it: links 0, 1, 2, … have the ports 0 and 1,
2 and 3, 4 and 5, …, so that `port ^ 1` is the other direction. A *lane* is one congestion-control state of a flow: flows have
one, or one a path where each path is controlled by itself. Times are integer picoseconds, sizes bytes, rates of ports Mb/s.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLASSES = 4  # queues a port: class 0 has strict priority (acknowledgements, congestion notifications, PFC)
HOPS = 8  # switches a packet can pass on one path, at most
CC_STATE = 24  # numbers of state a lane, laid out by the congestion-control algorithm
CC_PARAMS = 24  # parameters a profile
PAUSE_FRAME = 64  # bytes of a PAUSE or RESUME on the wire

# What happens: kinds of entries of the event heap. The argument is a port, a flow or a lane.
TX, ARRIVE, START, PACE, RTO, SAMPLE, COMPUTED, DELAYED_ACK, TIMER_A, TIMER_B = range(10)

# Kinds of packets.
DATA, ACK, NACK, PAUSE, RESUME, CREDIT = range(6)

# Fields of the in-band telemetry that a switch writes into a packet: time (ps), bytes sent, bytes queued, rate (Mb/s), and
# for µFAB the sums of weights (in thousandths) and of windows of the tenants on the port.
INT_TIME, INT_BYTES, INT_QUEUE, INT_RATE, INT_WEIGHT, INT_WINDOW = range(6)
INT_FIELDS = 6

# How losses are recovered.
GO_BACK_N, NEWRENO, SELECTIVE = range(3)

# How a flow's packets choose among its paths.
ONE_PATH, SPRAY, ROUND_ROBIN, BY_LANE, ADAPTIVE, SEGMENTS = range(6)

# What a sender with selective repeat knows of a packet: not sent or lost, acknowledged, or on the way by the lane value − ON_LANE.
LOST, ACKED, ON_LANE = range(3)

# Link-level flow control.
LOSSY, PFC, CREDITS = range(3)

# How `advance` ended.
FINISHED, IDLE, UNTIL, CHUNK, GROW, STALLED = range(6)

port_type = np.dtype(
    [
        ("rate", "i8"),  # Mb/s
        ("delay", "i8"),  # propagation, ps
        ("busy_until", "i8"),  # when the packet that is being sent has left
        ("tx_bytes", "i8"),  # sent so far, as INT reports it
        ("mark_low", "i8"),  # ECN: below this many bytes of the queue nothing is marked
        ("mark_high", "i8"),  # ECN: above, everything is
        ("mark_share", "f8"),  # ECN: share that is marked just below mark_high
        ("limit", "i8"),  # bytes of the egress queue beyond which packets are dropped; 0: no limit of its own
        (
            "headroom",
            "i8",
        ),  # PFC: bytes kept for what arrives after a PAUSE, for each class at the far end of this port
        ("shift", "i8"),  # PFC: threshold = free shared buffer >> shift, at the far end of this port
        ("drops", "i8"),
        ("marks", "i8"),
        ("pauses", "i8"),  # PAUSE frames received
        ("paused_since", "i8"),
        ("paused_time", "i8"),
        ("max_queue", "i8"),
        ("weight", "i8"),  # µFAB: thousandths, summed over the flows that pass
        ("window", "i8"),  # µFAB: bytes, summed over the flows that pass
        ("util", "f8"),  # PINT: the moving average of the utilisation
        ("util_time", "i8"),  # PINT: when it was last updated
        ("node", "i4"),  # where it starts
        ("peer", "i4"),  # where it ends
        ("pipe_head", "i4"),  # packets on the wire, in order
        ("pipe_tail", "i4"),
        ("paused", "i4"),  # bit a class
        ("pausing", "i4"),  # bit a class: PAUSE was sent to the sender of this port
        ("waiting", "i4"),  # packets in its queues and flows in its lists
        ("next_class", "i4"),  # data class served next (deficit round robin)
        ("tx_pending", "i1"),  # whether a TX event is in the heap
        ("down", "i1"),  # the link has failed: everything sent is lost
    ],
    align=True,
)
# One record a (port, class).
queue_type = np.dtype(
    [
        ("bytes", "i8"),  # in the egress queue
        ("ingress", "i8"),  # bytes that came over this port and wait in the switch at its far end, without headroom
        ("ingress_headroom", "i8"),  # the same, in the headroom
        ("credits", "i8"),  # bytes that the far end can still buffer (credit flow control)
        ("owed", "i8"),  # bytes of credit that the far end has not sent back yet
        ("deficit", "i8"),  # bytes that deficit round robin still allows
        ("quantum", "i8"),  # bytes a round
        ("head", "i4"),
        ("tail", "i4"),
        ("ready_head", "i4"),  # flows of this host that may send, in round-robin order
        ("ready_tail", "i4"),
    ],
    align=True,
)
node_type = np.dtype(
    [
        ("buffer", "i8"),  # bytes that ports share
        ("used", "i8"),  # bytes in it
        ("shared", "i8"),  # PFC: bytes above the reserve of their queue
        ("reserve", "i8"),  # PFC: bytes a (port, class) that are never shared
        ("kept", "i8"),  # PFC: sum of the headroom and the reserve
        ("max_used", "i8"),
        ("alpha", "f8"),  # LOSSY: an egress queue may hold alpha times the free buffer
        ("flow_control", "i4"),
        ("is_switch", "i4"),
        ("reports", "i4"),  # marks packets and writes telemetry: switches of the network, not those inside of servers
    ],
    align=True,
)
packet_type = np.dtype(
    [
        ("sent", "i8"),  # when the data packet left its host
        ("arrive", "i8"),  # at the far end of the link that it is on
        ("util", "f8"),  # PINT: the encoded maximum along the path
        ("window", "i8"),  # µFAB: change of the sender's window
        ("flow", "i4"),
        ("lane", "i4"),
        ("seq", "i4"),  # number of the packet in its flow
        ("cumulative", "i4"),  # of an acknowledgement: all packets below have arrived
        ("size", "i4"),  # on the wire
        ("path", "i4"),
        ("next", "i4"),  # in its queue, on its wire, or in the list of free packets
        ("ingress", "i4"),  # port over which it came into the switch where it is
        ("weight", "i4"),  # µFAB: +w at the first packet of a flow, -w at the last
        ("kind", "i1"),
        ("cls", "i1"),  # traffic class
        ("hop", "i1"),  # links passed
        ("marked", "i1"),  # ECN
        ("hops", "i1"),  # records of telemetry
        ("in_headroom", "i1"),
        ("segment", "i1"),  # SEGMENTS: of its list, how many it has passed
        ("strip", "i1"),  # SEGMENTS: one is taken off as it leaves
    ],
    align=True,
)
flow_type = np.dtype(
    [
        ("size", "i8"),  # bytes
        ("start", "i8"),  # earliest start, or delay after what it depends on, ps
        ("began", "i8"),
        ("finish", "i8"),  # last byte at the receiver; -1 before
        ("received", "i8"),  # bytes that have arrived, each counted once
        ("duration", "i8"),  # of work that sends nothing, ps
        ("rto_deadline", "i8"),
        ("rto_min", "i8"),
        ("srtt", "f8"),  # ps; 0 before the first sample
        ("rttvar", "f8"),
        ("last_cnp", "i8"),
        ("cnp_gap", "i8"),  # ps between two notifications of congestion; 0: every mark is echoed
        ("bits", "i8"),  # where its bitmaps start
        ("backoff", "i4"),
        ("packets", "i4"),
        ("next_seq", "i4"),  # next packet to be sent
        ("max_seq", "i4"),  # packets below were sent at least once
        ("una", "i4"),  # packets below are acknowledged
        ("expected", "i4"),  # receiver: packets below have arrived
        ("arrived", "i4"),  # receiver: different packets
        ("last_nack", "i4"),  # receiver: what the last NACK asked for
        ("held", "i4"),  # receiver: an acknowledgement that waits for the next packet; -1: none
        ("unanswered", "i4"),  # receiver: packets since the last acknowledgement
        ("held_since", "i8"),
        ("dup_acks", "i4"),
        ("reorder", "i4"),  # SELECTIVE: packets below an acknowledged one by so many are lost
        ("recover", "i4"),  # recovery ends when packets below are acknowledged; -1 outside of recovery
        ("no_fast_below", "i4"),  # NEWRENO: duplicates of packets sent before a timeout start no fast retransmit
        ("rtx_next", "i4"),  # SELECTIVE: next packet that may have to be sent again
        ("lost_below", "i4"),  # SELECTIVE: packets below that are not acknowledged are lost
        ("retransmits", "i4"),
        ("timeouts", "i4"),
        ("fast_recoveries", "i4"),
        ("src", "i4"),
        ("dst", "i4"),
        ("first_path", "i4"),
        ("paths", "i4"),
        ("first_segment", "i4"),  # SEGMENTS
        ("segments", "i4"),  # the destination included
        ("turn", "i4"),  # path of the next packet (ROUND_ROBIN)
        ("first_lane", "i4"),
        ("lanes", "i4"),
        ("port", "i4"),  # of its host
        ("weight", "i4"),  # µFAB's bandwidth token, thousandths
        ("waits_for", "i4"),  # flows that it depends on and that have not finished
        ("first_dependent", "i4"),
        ("dependents", "i4"),
        ("next_ready", "i4"),  # in the list of flows that may send
        ("cc", "i4"),  # congestion-control algorithm
        ("profile", "i4"),  # row of its parameters
        ("cls", "i1"),
        ("recovery", "i1"),
        ("routing", "i1"),
        ("telemetry", "i1"),  # switches write INT into its packets
        ("ready", "i1"),  # in the list of its port
        ("pace_pending", "i1"),
        ("rto_pending", "i1"),
        ("active", "i1"),
        ("ack_pending", "i1"),  # whether the event of a delayed acknowledgement is in the heap
        ("last_mark", "i1"),  # receiver: whether the newest packet was marked
        ("needs_rtx", "i1"),
    ],
    align=True,
)
lane_type = np.dtype(
    [
        ("window", "f8"),  # bytes
        ("rate", "f8"),  # bytes a ps; 0: not paced
        ("in_flight", "f8"),  # bytes
        ("next_send", "i8"),  # not before, ps
        ("rtt", "f8"),  # last sample, ps
        ("last_ack", "i8"),  # or, if later, since when packets are on the way
        ("flow", "i4"),
        ("path", "i4"),
        ("timeouts", "i4"),  # in a row
        ("ejected", "i4"),
        ("epoch", "i4"),  # of the timers
        ("timer_pending", "i4"),  # bit a timer
        ("state", "f8", (CC_STATE,)),  # of its congestion control
        ("seen", "i8", (HOPS, INT_FIELDS)),  # the last telemetry that its sender has read
    ],
    align=True,
)
event_type = np.dtype([("time", "i8"), ("tie", "i8"), ("what", "i8")])  # what: argument · 16 + kind
telemetry_type = np.dtype([("records", "i8", (HOPS, INT_FIELDS))])
profile_type = np.dtype([("params", "f8", (CC_PARAMS,))])
byte_type, int32_type, int64_type = (np.dtype([("value", kind)]) for kind in ("u1", "i4", "i8"))
ARRAYS = (
    "heap",
    "ports",
    "queues",
    "nodes",
    "packets",
    "telemetry",
    "flows",
    "lanes",
    "profiles",
    "path_start",
    "path_ports",
    "dependents",
    "segments",
    "segment_nodes",
    "next_hops",
    "arrived",
    "acked",
    "watched_ports",
    "watched_flows",
    "port_samples",
    "flow_samples",
    "sample_times",
)
world_type = np.dtype(
    [
        *((name, "i8") for name in ARRAYS),  # addresses
        ("now", "i8"),
        ("sequence", "i8"),  # of events
        ("events", "i8"),
        ("delivered", "i8"),  # data packets that have reached their receiver
        ("hops", "i8"),  # links that packets have crossed
        ("last_progress", "i8"),
        ("stall_after", "i8"),  # ps without any delivery after which the loop stops
        ("sample_every", "i8"),
        ("rng", "u8"),
        ("heap_size", "i4"),
        ("free_head", "i4"),
        ("free_count", "i4"),
        ("flow_count", "i4"),
        ("unfinished", "i4"),
        ("samples", "i4"),
        ("most_samples", "i4"),
        ("watched_port_count", "i4"),
        ("watched_flow_count", "i4"),
        ("payload", "i4"),  # bytes of data a packet, at most
        ("header", "i4"),  # bytes of headers a data packet
        ("ack_size", "i4"),
        ("ack_class", "i4"),  # 0: acknowledgements go before data
        ("mark_at_enqueue", "i4"),  # ECN by the queue that a packet finds, not the one that it leaves
        ("nic_rate", "i8"),  # Mb/s of the hosts, as HPCC and PFC scale by it
        ("base_rtt", "i8"),  # T of HPCC, ps
        ("probe_gap", "i8"),  # ps after which an ejected path is tried again; 0: never
        ("ack_delay", "i8"),  # ps that an acknowledgement waits for the next packet
        ("ack_every", "i4"),  # packets an acknowledgement
        ("node_count", "i4"),
        ("segment_base", "i4"),  # bytes of a segment-routing header
        ("segment_bytes", "i4"),  # and of each segment in it
    ],
    align=True,
)


@dataclass
class State:
    """The arrays, named as their addresses in `world`."""

    world: np.ndarray  # (1,) world_type
    heap: np.ndarray  # (capacity,) event_type
    ports: np.ndarray  # (P,) port_type
    queues: np.ndarray  # (P · CLASSES,) queue_type
    nodes: np.ndarray  # (N,) node_type
    packets: np.ndarray  # (pool,) packet_type
    telemetry: np.ndarray  # (pool,) telemetry_type: apart from the packets, which stay in the caches without it
    flows: np.ndarray  # (F,) flow_type
    lanes: np.ndarray  # (L,) lane_type
    profiles: np.ndarray  # (profiles,) profile_type
    path_start: np.ndarray  # (paths + 1,) int64
    path_ports: np.ndarray  # (…,) int32
    dependents: np.ndarray  # (…,) int32
    segments: np.ndarray  # (…,) int32: the targets that flows pass
    segment_nodes: np.ndarray  # (targets,) int32: the node of each target
    next_hops: np.ndarray  # (targets · nodes,) int32: the port from each node towards each target
    arrived: np.ndarray  # (packets of all flows,) uint8: has reached the receiver
    acked: np.ndarray  # (packets of all flows,) uint8: LOST, ACKED, ON_LANE + lane
    watched_ports: np.ndarray  # (…,) int32
    watched_flows: np.ndarray  # (…,) int32
    port_samples: np.ndarray  # (samples, watched ports, 2) int64: queue, bytes sent
    flow_samples: np.ndarray  # (samples, watched flows) int64: bytes received
    sample_times: np.ndarray  # (samples,) int64

    def __post_init__(self):
        self.write_addresses()

    def write_addresses(self) -> None:
        """Tell the compiled loop where the arrays lie: after one of them was replaced."""
        for name in ARRAYS:
            array = getattr(self, name)
            assert array.flags.c_contiguous
            self.world[0][name] = array.ctypes.data
