"""The shared buffer of a switch: what is let in, when a sender is paused, what is returned as credit.

PFC's accounting follows the description of the memory management unit in HPCC's simulation: each (ingress port, class) has a
reserve, a share of what is left (a power of two below it), and headroom for what is on the wire when PAUSE takes effect.
"""

from __future__ import annotations

from luban.netsim.compiled import compiled
from luban.netsim.engine.access import node_at, packet_at, port_at, queue_at
from luban.netsim.engine.heap import push
from luban.netsim.engine.layout import CLASSES, CREDIT, LOSSY, PAUSE, PAUSE_FRAME, PFC, RESUME, TX

RESUME_OFFSET = 3000  # bytes below the threshold at which a paused sender may go on
CREDIT_SIZE = 8  # bytes of a flow-control packet of InfiniBand


@compiled
def threshold(s, node, port):
    """Bytes above its reserve that a class of the ingress port may use before it is paused."""
    free = node.buffer - node.kept - node.shared
    return max(free, 0) >> port.shift


@compiled
def admit(s, packet, ingress, egress):
    """Let the packet that came over port `ingress` into the switch, towards port `egress`. False: it has to be dropped."""
    p = packet_at(s, packet)
    node = node_at(s, port_at(s, ingress).peer)
    size = p.size
    if node.flow_control == LOSSY:
        queue = queue_at(s, egress * CLASSES + p.cls)
        limit = port_at(s, egress).limit
        if limit > 0 and queue.bytes + size > limit:
            return False
        if node.used + size > node.buffer or queue.bytes + size > node.alpha * (node.buffer - node.used):
            return False
    elif p.cls == 0:  # control packets are never held back
        p.in_headroom = 0
    elif node.flow_control == PFC:
        if not _account(
            queue_at(s, ingress * CLASSES + p.cls),
            node,
            port_at(s, ingress),
            p,
            threshold(s, node, port_at(s, ingress)),
        ):
            return False
        pause_if_needed(s, ingress, p.cls)
    else:
        queue_at(s, ingress * CLASSES + p.cls).ingress += size
    node.used += size
    node.max_used = max(node.max_used, node.used)
    p.ingress = ingress
    return True


@compiled
def _account(queue, node, port, p, allowed):
    """Count a packet in the reserve, the shared part or the headroom of its ingress queue; False: it fits nowhere."""
    after = queue.ingress + p.size
    p.in_headroom = 0
    if after <= node.reserve:
        queue.ingress = after
        return True
    if after - node.reserve <= allowed:
        node.shared += min(p.size, after - node.reserve)
        queue.ingress = after
        return True
    if queue.ingress_headroom + p.size <= port.headroom:
        queue.ingress_headroom += p.size
        p.in_headroom = 1
        return True
    return False


@compiled
def release(s, packet):
    """Take a packet that leaves the switch out of its buffer."""
    p = packet_at(s, packet)
    ingress = p.ingress
    if ingress < 0:
        return
    node = node_at(s, port_at(s, ingress).peer)
    node.used -= p.size
    p.ingress = -1
    if node.flow_control == LOSSY or p.cls == 0:
        return
    queue = queue_at(s, ingress * CLASSES + p.cls)
    if node.flow_control == PFC:
        if p.in_headroom:
            queue.ingress_headroom -= p.size
        else:
            node.shared -= min(p.size, max(queue.ingress - node.reserve, 0))
            queue.ingress -= p.size
        resume_if_possible(s, ingress, p.cls)
    else:
        queue.ingress -= p.size
        return_credit(s, ingress, p.cls, p.size)


@compiled
def pause_if_needed(s, ingress, cls):
    """Send PAUSE to the sender of port `ingress` if its class uses headroom or has reached its threshold."""
    port, queue = port_at(s, ingress), queue_at(s, ingress * CLASSES + cls)
    node = node_at(s, port.peer)
    above = queue.ingress - node.reserve >= threshold(s, node, port)
    if not port.pausing & (1 << cls) and (queue.ingress_headroom > 0 or above):
        port.pausing |= 1 << cls
        send_control(s, ingress ^ 1, PAUSE, cls, PAUSE_FRAME)


@compiled
def resume_if_possible(s, ingress, cls):
    """Send RESUME to a paused sender whose class has left the headroom and is well below the threshold."""
    port, queue = port_at(s, ingress), queue_at(s, ingress * CLASSES + cls)
    if not port.pausing & (1 << cls) or queue.ingress_headroom > 0:
        return
    node = node_at(s, port.peer)
    used = max(queue.ingress - node.reserve, 0)
    if used == 0 or used + RESUME_OFFSET <= threshold(s, node, port):
        port.pausing &= ~(1 << cls)
        send_control(s, ingress ^ 1, RESUME, cls, PAUSE_FRAME)


@compiled
def return_credit(s, ingress, cls, size):
    """Tell the sender of port `ingress` that `size` bytes are free again, an eighth of the buffer at a time."""
    queue = queue_at(s, ingress * CLASSES + cls)
    queue.owed += size
    if queue.owed * 8 >= queue.ingress + queue.owed + max(queue.credits, 0) or queue.ingress == 0:
        send_control(s, ingress ^ 1, CREDIT, cls, CREDIT_SIZE)


@compiled
def send_control(s, port, kind, cls, size):
    """Put a control frame before everything else that waits at `port`; it is sent when the current packet has left."""
    packet = s.free_head
    p = packet_at(s, packet)
    s.free_head = p.next
    s.free_count -= 1
    p.kind, p.cls, p.size, p.flow, p.hops, p.ingress = kind, 0, size, -1, 0, -1
    p.seq = cls
    queue = queue_at(s, port * CLASSES)
    if kind == CREDIT:
        returned = queue_at(s, (port ^ 1) * CLASSES + cls)
        p.cumulative = returned.owed
        returned.owed = 0
    # RESUME must not overtake a PAUSE that still waits: control frames stay in order behind one another.
    before, after = -1, queue.head
    while after >= 0 and packet_at(s, after).kind >= PAUSE:
        before, after = after, packet_at(s, after).next
    p.next = after
    if before < 0:
        queue.head = packet
    else:
        packet_at(s, before).next = packet
    if after < 0:
        queue.tail = packet
    queue.bytes += size
    out = port_at(s, port)
    out.waiting += 1
    if not out.tx_pending:
        out.tx_pending = 1
        push(s, max(s.now, out.busy_until), TX, port)
