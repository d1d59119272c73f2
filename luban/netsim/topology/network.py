"""A network as a graph, and its shortest paths as lists of ports.

Link `i` joins nodes `a` and `b`; port `2·i` sends from a to b, port `2·i + 1` from b to a. Hosts are end points: no path passes
through one. Host numbers (ranks) count the hosts in the order in which they were added; node numbers count all nodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from luban.core.errors import ConfigError

NAMED = 8  # neighbours that an error names
Path = tuple[int, ...]  # ports from the source host to the destination


@dataclass(frozen=True)
class Link:
    """A cable: two nodes, Mb/s each way, propagation in picoseconds."""

    a: int
    b: int
    rate: int
    delay: int


@dataclass
class Network:
    """Nodes and links; made by a topology, then only read."""

    names: list[str] = field(default_factory=list)  # of the nodes
    switches: list[bool] = field(default_factory=list)  # whether a node is one
    tiers: list[int] = field(default_factory=list)  # row in which a node is drawn, 0: hosts
    links: list[Link] = field(default_factory=list)
    hosts: list[int] = field(default_factory=list)  # node of each host
    failed: set[int] = field(default_factory=set)  # links that carry nothing
    inside: set[int] = field(default_factory=set)  # switches inside of servers: credits, no marks, no telemetry
    _ports: list[list[int]] = field(default_factory=list)  # that leave each node
    _distances: dict[int, list[int]] = field(default_factory=dict)
    _next: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def add_host(self, name: str) -> int:
        """A host; returns its node."""
        self.hosts.append(self._add(name, False, 0))
        return self.hosts[-1]

    def add_switch(self, name: str, tier: int = 1, *, inside: bool = False) -> int:
        """A switch, of the network or inside of a server (PCIe, NVLink, a network card); returns its node."""
        node = self._add(name, True, tier)
        if inside:
            self.inside.add(node)
        return node

    def is_fabric(self, node: int) -> bool:
        """Whether a node is a switch of the network."""
        return self.switches[node] and node not in self.inside

    def nic_rate(self) -> int:
        """The fastest link (Mb/s) over which traffic comes into the network's switches from outside of them: not NVLink or PCIe,
        which stay inside of a server. Of all links the fastest where the network has no switches."""
        rates = [link.rate for link in self.links if self.is_fabric(link.a) != self.is_fabric(link.b)]
        return max(rates or [link.rate for link in self.links])

    def _add(self, name: str, switch: bool, tier: int) -> int:
        self.names.append(name)
        self.switches.append(switch)
        self.tiers.append(tier)
        self._ports.append([])
        return len(self.names) - 1

    def connect(self, a: int, b: int, gbps: float, delay_us: float) -> int:
        """A link; returns its number.

        Raises:
            ConfigError: a rate or delay that no cable has.
        """
        rate, delay = round(gbps * 1000), round(delay_us * 1e6)
        if rate < 1 or delay < 0:
            raise ConfigError(
                f"link {self.names[a]} to {self.names[b]}: {gbps:g} Gb/s and {delay_us:g} µs; a link needs at least 0.001 Gb/s, and no delay below 0"
            )
        self.links.append(Link(a, b, rate, delay))
        n = len(self.links) - 1
        self._ports[a].append(2 * n)
        self._ports[b].append(2 * n + 1)
        return n

    def ends(self, port: int) -> tuple[int, int]:
        """The nodes that a port sends from and to."""
        link = self.links[port >> 1]
        return (link.a, link.b) if port & 1 == 0 else (link.b, link.a)

    def port_name(self, port: int) -> str:
        """`leaf0→spine1`."""
        a, b = self.ends(port)
        return f"{self.names[a]}→{self.names[b]}"

    def port_between(self, a: int, b: int) -> int:
        """The first port from node a to node b; raises ConfigError where no link joins them."""
        for port in self._ports[a]:
            if self.ends(port)[1] == b and port >> 1 not in self.failed:
                return port
        joined = sorted({self.names[self.ends(port)[1]] for port in self._ports[a] if port >> 1 not in self.failed})
        raise ConfigError(
            f"no link joins {self.names[a]} and {self.names[b]}; {self.names[a]} is joined to {', '.join(joined[:NAMED])}"
            f"{f' and {len(joined) - NAMED} more' if len(joined) > NAMED else ''}"
        )

    def fail(self, link: int) -> None:
        """Take a link out of service, before anything runs."""
        self.failed.add(link)
        self._distances.clear()
        self._next.clear()

    def distances(self, node: int) -> list[int]:
        """Links from every node to `node` without passing a host; -1: not reachable."""
        if node not in self._distances:
            found = [-1] * len(self.names)
            found[node] = 0
            waiting = deque([node])
            while waiting:
                here = waiting.popleft()
                if here != node and not self.switches[here]:
                    continue
                for port in self._ports[here]:
                    other = self.ends(port)[1]
                    if found[other] < 0 and port >> 1 not in self.failed:
                        found[other] = found[here] + 1
                        waiting.append(other)
            self._distances[node] = found
        return self._distances[node]

    def next_ports(self, here: int, target: int) -> list[int]:
        """The ports from `here` that lie on a shortest path to node `target`."""
        if (here, target) not in self._next:
            away = self.distances(target)
            self._next[here, target] = [
                port
                for port in self._ports[here]
                if port >> 1 not in self.failed
                and away[self.ends(port)[1]] == away[here] - 1
                and (self.switches[self.ends(port)[1]] or self.ends(port)[1] == target)
            ]
        return self._next[here, target]

    def hashed_path(self, src: int, dst: int, rng: np.random.Generator) -> Path:
        """One shortest path between two hosts, chosen hop by hop as ECMP's hash does.

        Raises:
            ConfigError: there is none.
        """
        here, target, path = self._check(src, dst), self.hosts[dst], []
        while here != target:
            options = self.next_ports(here, target)
            path.append(options[int(rng.integers(len(options)))] if len(options) > 1 else options[0])
            here = self.ends(path[-1])[1]
        return tuple(path)

    def shortest_paths(self, src: int, dst: int, most: int, rng: np.random.Generator) -> list[Path]:
        """Different shortest paths between two hosts: all of them, or `most` drawn at random."""
        all_paths = self._enumerate(self._check(src, dst), self.hosts[dst], 4 * most)
        if len(all_paths) <= most:
            return all_paths
        chosen = {self.hashed_path(src, dst, rng) for _ in range(4 * most)}
        return sorted(chosen)[:most] if len(chosen) >= most else all_paths[:most]

    def _enumerate(self, here: int, target: int, most: int) -> list[Path]:
        if here == target:
            return [()]
        found: list[Path] = []
        for port in self.next_ports(here, target):
            found += [(port, *rest) for rest in self._enumerate(self.ends(port)[1], target, most)]
            if len(found) > most:
                break
        return found

    def segment_path(self, src: int, segments: Sequence[int], dst: int, hops: dict[int, list[int]]) -> Path:
        """The way from host to host by a list of nodes, where each node sends on as `hops` (target → port from every node) says."""
        here, path = self.hosts[src], []
        for target in (*segments, self.hosts[dst]):
            while here != target:
                path.append(hops[target][here])
                here = self.ends(path[-1])[1]
        return tuple(path)

    def next_hops(self, target: int, rng: np.random.Generator) -> list[int]:
        """One port of a shortest path to node `target` from every node; -1: there is none."""
        options = [
            self.next_ports(node, target) if self.distances(target)[node] > 0 else [] for node in range(len(self.names))
        ]
        return [found[int(rng.integers(len(found)))] if found else -1 for found in options]

    def require_host(self, host: int) -> None:
        """Raise ConfigError unless there is a host of this number."""
        if not 0 <= host < len(self.hosts):
            raise ConfigError(f"a flow of host {host}: there are hosts 0 to {len(self.hosts) - 1}")

    def _check(self, src: int, dst: int) -> int:
        for host in (src, dst):
            self.require_host(host)
        here = self.hosts[src]
        if self.distances(self.hosts[dst])[here] < 0:
            raise ConfigError(
                f"no path from {self.names[here]} to {self.names[self.hosts[dst]]}: the network isn't connected"
            )
        return here

    def require_connected(self) -> None:
        """Raise ConfigError unless every host reaches every other."""
        if not self.hosts:
            raise ConfigError("the topology has no hosts")
        away = self.distances(self.hosts[0])
        lost = [self.names[node] for node in self.hosts if away[node] < 0]
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise ConfigError(
                f"the topology isn't connected: no path from {self.names[self.hosts[0]]} to {', '.join(lost[:3])}{more}"
            )
