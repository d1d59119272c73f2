"""Topologies as configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant
from luban.netsim.topology.network import Network

_AT = "luban.netsim.topology."


@dataclass(frozen=True, kw_only=True)
class Topology(Variant):
    """Hosts, switches and cables."""

    registry: ClassVar[Registry] = Registry(
        "topology",
        {
            "star": _AT + "clos:Star",
            "chain": _AT + "clos:Chain",
            "leaf_spine": _AT + "clos:LeafSpine",
            "clos": _AT + "clos:Clos",
            "fat_tree": _AT + "fat_tree:FatTree",
            "bigraph": _AT + "bigraph:BiGraph",
            "torus": _AT + "torus:Torus",
            "dragonfly": _AT + "dragonfly:Dragonfly",
            "servers": _AT + "servers:Servers",
            "rails": _AT + "rails:Rails",
            "x_man": _AT + "x_man:XMan",
            "graph": _AT + "graph:Graph",
        },
    )

    OPTIONAL: ClassVar[tuple[str, ...]] = ()  # rates of links that are not there at 0

    delay_us: float = 1.0  # propagation of a cable
    failed_links: tuple[int, ...] = ()  # numbers of links that are out of service from the start

    def network(self) -> Network:
        """The graph, failed links taken out.

        Raises:
            ConfigError: what is wrong with the topology.
        """
        self._require_links()
        network = self.build()
        for link in self.failed_links:
            if not 0 <= link < len(network.links):
                raise ConfigError(f"topology.failed_links: there is no link {link}, only 0 to {len(network.links) - 1}")
            network.fail(link)
        network.require_connected()
        return network

    def build(self) -> Network:
        """The graph."""
        raise NotImplementedError

    def _require_links(self) -> None:
        """Raise ConfigError for a rate or delay that no link has."""
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name.endswith("gbps") and not (value >= 0.001 or (value == 0 and name in self.OPTIONAL)):
                none = " (0: no such link)" if name in self.OPTIONAL else ""
                raise ConfigError(f"topology.{name} must be at least 0.001 Gb/s{none}, {value:g} given")
            if name.endswith("delay_us") and not value >= 0:
                raise ConfigError(f"topology.{name} must not be below 0 µs, {value:g} given")

    def require(self, **least: int) -> None:
        """Raise ConfigError for the first field below its least value."""
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"topology.{name} must be at least {low}, {getattr(self, name)} given")
