"""Flows given one by one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from luban.core.errors import ConfigError
from luban.netsim.engine.layout import CLASSES
from luban.netsim.flows import Flow, at_microseconds
from luban.netsim.topology.network import Network
from luban.netsim.workloads.base import Workload

MOST_BYTES = 1e15  # of a flow
MOST_WEIGHT = 1e6  # of a flow
MOST_US = 1e12  # of its start: a simulation's clock counts picoseconds in 63 bits


@dataclass(frozen=True, kw_only=True)
class Flows(Workload):
    """Flows as text: `"0 3 1e6"` sends 1 MB from host 0 to host 3, `"0 3 1e6 50"` after 50 µs, `"0 3 1e6 50 2"` in class 2,
    `"0 3 1e6 50 2 4.0"` with weight 4; `"0 3 1e6 via spine2 leaf1"` by segment routing over these switches."""

    # each "FROM TO BYTES [START_US [CLASS [WEIGHT]]] [via SWITCH …]" with numbers of hosts, as "0 3 1e6 50 2 4.0 via leaf0 spine1"
    flows_list: tuple[str, ...]

    def flows(self, network: Network, rng: np.random.Generator) -> list[Flow]:
        """One flow a text."""
        return [self._flow(text, network) for text in self.flows_list]

    @staticmethod
    def _flow(text: str, network: Network) -> Flow:
        numbers, via, names = text.partition(" via ")
        hosts = len(network.hosts)
        try:
            words = numbers.split()
            src, dst, size, start, cls, weight = (*map(float, words), *(0.0, 1.0, 1.0)[len(words) - 3 :])
        except ValueError:
            raise ConfigError(
                f'workload.flows_list: {text!r} is not "FROM TO BYTES [START_US [CLASS [WEIGHT]]] [via NODE …]"'
            ) from None
        _check(text, size, start, cls, weight)
        for host in (src, dst):
            if not math.isfinite(host) or host != int(host) or not 0 <= host < hosts:
                raise ConfigError(
                    f"workload.flows_list: {text!r} names host {host:g}; there are hosts 0 to {hosts - 1}"
                )
        if src == dst:
            raise ConfigError(
                f"workload.flows_list: {text!r} sends from host {src:g} to itself: FROM and TO must differ"
            )
        for name in names.split():
            if name not in network.names:
                raise ConfigError(f"workload.flows_list: {text!r} goes over {name}, which the topology doesn't have")
        segments = tuple(map(network.names.index, names.split())) if via else None
        begins = at_microseconds(start)
        return Flow(int(src), int(dst), int(size), start=begins, cls=int(cls), weight=weight, segments=segments)


def _check(text: str, size: float, start: float, cls: float, weight: float) -> None:
    """Raise ConfigError for a number that no flow has; not a number (NaN) is in no range."""
    for name, value, fits, right in (
        ("BYTES", size, 0 <= size <= MOST_BYTES and size == int(size), f"a whole number from 0 to {MOST_BYTES:g}"),
        ("START_US", start, 0 <= start <= MOST_US, f"a number from 0 to {MOST_US:g}"),
        ("CLASS", cls, cls in range(1, CLASSES), f"one of 1 to {CLASSES - 1}"),
        ("WEIGHT", weight, 0 < weight <= MOST_WEIGHT, f"a number above 0, at most {MOST_WEIGHT:g}"),
    ):
        if not fits:
            raise ConfigError(f"workload.flows_list: {text!r}: {name} must be {right}, {value:g} given")
