"""Flows with published sizes that start at random times, as data-centre traffic is simulated."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from luban.core.errors import ConfigError
from luban.netsim.flows import Flow
from luban.netsim.topology.network import Network
from luban.netsim.workloads.base import Workload

# Distributions of flow sizes as bytes:cumulative percent, as published with HPCC's simulation.
POINTS = {
    "web_search": "0:0 10000:15 20000:20 30000:30 50000:40 80000:53 200000:60 1e6:70 2e6:80 5e6:90 1e7:97 3e7:100",
    "hadoop": "0:0 100:1 200:2 300:5 350:15 400:20 500:30 600:40 700:50 1000:60 2000:67 7000:70 30000:72 50000:82 80000:87 "
    "120000:90 300000:95 1e6:97.5 2e6:99 1e7:100",
    "storage": "0:0 4000:22.93 8000:69.21 16000:80.61 32000:90.47 64000:93.53 128000:96.77 256000:97.53 2e6:100",
}
SIZES = {name: [tuple(map(float, point.split(":"))) for point in text.split()] for name, text in POINTS.items()}


def mean_size(name: str) -> float:
    """Mean of a distribution, bytes: straight lines between its points."""
    points = SIZES[name]
    return sum((b[1] - a[1]) / 100 * (a[0] + b[0]) / 2 for a, b in itertools.pairwise(points))


def draw_sizes(name: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """n sizes in bytes, at least 1."""
    size, percent = np.array(SIZES[name]).T
    return np.maximum(np.interp(rng.uniform(0, 100, n), percent, size), 1).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Poisson(Workload):
    """Poisson arrivals between random hosts, with incasts beside them."""

    sizes: Literal["web_search", "hadoop", "storage"] = "hadoop"  # distribution of flow sizes
    load: float = 0.3  # of the bandwidth of the hosts' network cards
    duration_us: float = 1000.0  # in which flows start
    incast_load: float = 0.0  # of the same, on top
    incast_senders: int = 60  # of each incast
    incast_bytes: int = 500_000  # of each of its senders

    def flows(self, network: Network, rng: np.random.Generator) -> list[Flow]:
        """Flows in the order of their starts; those of incasts are labelled so."""
        hosts = len(network.hosts)
        if not 0 < self.load + self.incast_load < 1 or self.load < 0 or self.incast_load < 0:
            raise ConfigError("workload.load and workload.incast_load together must be above 0 and below 1")
        if self.incast_load and self.incast_senders >= hosts:
            raise ConfigError(
                f"workload.incast_senders {self.incast_senders} needs as many other hosts; there are {hosts}"
            )
        total = hosts * network.nic_rate() * 0.125 * self.duration_us  # bytes that the hosts could send
        count = int(rng.poisson(self.load * total / mean_size(self.sizes)))
        starts, sizes = rng.uniform(0, self.duration_us * 1e6, count), draw_sizes(self.sizes, count, rng)
        flows = []
        for start, size in zip(starts, sizes, strict=True):
            src, dst = rng.choice(hosts, 2, replace=False) if hosts < 64 else _two(hosts, rng)
            flows.append(Flow(int(src), int(dst), int(size), start=int(start), label=self.sizes))
        if self.incast_load:
            for _ in range(int(rng.poisson(self.incast_load * total / (self.incast_senders * self.incast_bytes)))):
                flows += self._incast(hosts, rng)
        return sorted(flows, key=lambda flow: flow.start)

    def _incast(self, hosts: int, rng: np.random.Generator) -> list[Flow]:
        chosen = rng.choice(hosts, self.incast_senders + 1, replace=False)
        start = int(rng.uniform(0, self.duration_us * 1e6))
        return [Flow(int(src), int(chosen[0]), self.incast_bytes, start=start, label="incast") for src in chosen[1:]]


def _two(hosts: int, rng: np.random.Generator) -> tuple[int, int]:
    src = int(rng.integers(hosts))
    return src, (src + 1 + int(rng.integers(hosts - 1))) % hosts
