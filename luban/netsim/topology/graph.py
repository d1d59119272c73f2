"""A topology given link by link."""

from __future__ import annotations

import re
from dataclasses import dataclass

from luban.core.errors import ConfigError
from luban.netsim.topology.base import Topology
from luban.netsim.topology.network import Network


@dataclass(frozen=True, kw_only=True)
class Graph(Topology):
    """Links as text: `"a b 100"` joins a and b at 100 Gb/s, `"a b 100 5"` with 5 µs of propagation. Names that start with
    `host` or `gpu` are hosts, all others switches."""

    # each "NODE NODE GBPS [MICROSECONDS]", as "host0 s0 100 1"; names that begin with host or gpu are hosts, others switches
    links: tuple[str, ...]

    def build(self) -> Network:
        """Nodes in the order in which links name them."""
        network, nodes = Network(), {}
        for text in self.links:
            parts = text.split()
            if len(parts) not in (3, 4) or not all(map(_is_number, parts[2:])):
                raise ConfigError(f'topology.links: {text!r} is not "NODE NODE GBPS [MICROSECONDS]"')
            for name in parts[:2]:
                if name not in nodes:
                    host = re.match("host|gpu", name)
                    nodes[name] = network.add_host(name) if host else network.add_switch(name)
            if parts[0] == parts[1]:
                raise ConfigError(f"topology.links: {text!r} joins a node with itself")
            if float(parts[2]) < 0.001:
                raise ConfigError(f"topology.links: {text!r}: GBPS must be at least 0.001, {parts[2]} given")
            delay = float(parts[3]) if len(parts) == 4 else self.delay_us
            network.connect(nodes[parts[0]], nodes[parts[1]], float(parts[2]), delay)
        return network


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?", text) is not None
