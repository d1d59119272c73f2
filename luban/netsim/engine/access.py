"""Access to the arrays by address, so that compiled functions pass one pointer on.

A compiled function that takes twenty arrays passes and reference-counts all of them at every call, and takes minutes to compile.
Here `s` is the record of type `world_type`; it holds the arrays' addresses, and `port_at(s, i)` is the i-th record of the ports,
read and written in place.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from luban.netsim.compiled import compiled
from luban.netsim.engine import layout as at


def _accessor(dtype: np.dtype):
    """A compiled function: address → the record of this type that lies there."""
    record = numba.from_dtype(dtype)

    @intrinsic
    def record_at(typing_context, address):  # numba hands in its typing context and the argument's type
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(record))

        return record(types.int64), generate

    return record_at


_heap, _port, _queue, _node = map(_accessor, (at.event_type, at.port_type, at.queue_type, at.node_type))
_packet, _flow, _lane, _profile = map(_accessor, (at.packet_type, at.flow_type, at.lane_type, at.profile_type))
_byte, _int32, _int64 = map(_accessor, (at.byte_type, at.int32_type, at.int64_type))
HEAP, PORT, QUEUE, NODE = (t.itemsize for t in (at.event_type, at.port_type, at.queue_type, at.node_type))
PACKET, FLOW, LANE, PROFILE = (t.itemsize for t in (at.packet_type, at.flow_type, at.lane_type, at.profile_type))


@compiled
def event_at(s, i):
    """Entry i of the event heap."""
    return _heap(s.heap + np.int64(i) * HEAP)


@compiled
def port_at(s, i):
    """Port i."""
    return _port(s.ports + np.int64(i) * PORT)


@compiled
def queue_at(s, i):
    """Queue i: class i mod CLASSES of port i // CLASSES."""
    return _queue(s.queues + np.int64(i) * QUEUE)


@compiled
def node_at(s, i):
    """Node i."""
    return _node(s.nodes + np.int64(i) * NODE)


@compiled
def packet_at(s, i):
    """Packet i of the pool."""
    return _packet(s.packets + np.int64(i) * PACKET)


@compiled
def flow_at(s, i):
    """Flow i."""
    return _flow(s.flows + np.int64(i) * FLOW)


@compiled
def lane_at(s, i):
    """Lane i."""
    return _lane(s.lanes + np.int64(i) * LANE)


@compiled
def state_at(s, lane):
    """The numbers that a lane's congestion control keeps, (CC_STATE,)."""
    return lane_at(s, lane).state


@compiled
def params_at(s, lane):
    """The parameters of a lane's congestion control, (CC_PARAMS,)."""
    profile = flow_at(s, lane_at(s, lane).flow).profile
    return _profile(s.profiles + np.int64(profile) * PROFILE).params


@compiled
def arrived_at(s, flow, seq):
    """The byte that says whether packet `seq` of a flow has arrived."""
    return _byte(s.arrived + flow.bits + seq)


@compiled
def acked_at(s, flow, seq):
    """The byte that says whether the sender knows that packet `seq` of a flow has arrived."""
    return _byte(s.acked + flow.bits + seq)


@compiled
def path_start(s, path):
    """Where a path's ports begin."""
    return _int64(s.path_start + np.int64(path) * 8).value


@compiled
def path_port(s, i):
    """Entry i of the ports of all paths."""
    return _int32(s.path_ports + np.int64(i) * 4).value


@compiled
def dependent(s, i):
    """Entry i of the flows that wait for others."""
    return _int32(s.dependents + np.int64(i) * 4).value


@compiled
def int32_at(address, i):
    """Entry i of an array of 32-bit integers."""
    return _int32(address + np.int64(i) * 4).value


@compiled
def cell_at(address, i):
    """Entry i of an array of 64-bit integers, as a record with the field `value`."""
    return _int64(address + np.int64(i) * 8)
