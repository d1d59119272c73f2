"""Deadlocks of PFC or credits: ports that wait for each other in a circle."""

from __future__ import annotations

from luban.netsim.engine import layout as at
from luban.netsim.topology.network import Network


def find_deadlock(network: Network, state: at.State) -> list[str]:
    """The ports of a circle in which each is held back by packets that wait for the next, the first one named again at the end;
    empty where there is none.

    A port is held back if its class is paused or has no credit, by the packets that came over it into the switch at its far end
    and wait there for another port that is held back.
    """
    waits: dict[tuple[int, int], set[tuple[int, int]]] = {}
    packet_size = int(state.world[0]["payload"] + state.world[0]["header"])
    for port in range(len(state.ports)):
        for cls in range(1, at.CLASSES):
            queue = state.queues[port * at.CLASSES + cls]
            held = state.ports[port]["paused"] >> cls & 1 or queue["credits"] < packet_size
            packet = int(queue["head"])
            while held and packet >= 0:
                row = state.packets[packet]
                if row["ingress"] >= 0:
                    waits.setdefault((int(row["ingress"]), cls), set()).add((port, cls))
                packet = int(row["next"])
    circle = _circle(waits)
    return [network.port_name(port) for port, _ in circle]


def _circle(edges: dict[tuple[int, int], set[tuple[int, int]]]) -> list[tuple[int, int]]:
    """A circle in a directed graph, its first node repeated at the end."""
    done: set[tuple[int, int]] = set()
    for root in edges:
        path, on_path = [root], {root}
        stack = [iter(sorted(edges.get(root, ())))]
        while stack:
            following = next(stack[-1], None)
            if following is None:
                stack.pop()
                done.add(path[-1])
                on_path.discard(path.pop())
            elif following in on_path:
                return [*path[path.index(following) :], following]
            elif following not in done:
                path.append(following)
                on_path.add(following)
                stack.append(iter(sorted(edges.get(following, ()))))
    return []
