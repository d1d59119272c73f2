"""A cluster as a TOML file: accelerators, nodes, links, price.

gpu = "h100-sxm"
nodes = 16
gpus_per_node = 8
price = 2.5                                     # of a GPU-hour
inside = { bandwidth = 450, latency_us = 4 }    # GB/s of a GPU to the others of its node, one direction
between = { bandwidth = 50, latency_us = 8 }    # GB/s of a GPU to other nodes
topology = { type = "rails", servers = 16 }     # optional: contention by max-min fair rates
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from luban.core.config import from_dict, read_toml
from luban.core.errors import ConfigError
from luban.netsim.topology.base import Topology
from luban.planner.accelerators import Accelerator, accelerator
from luban.planner.machine import MachineTable, machine_table


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins a GPU to others."""

    bandwidth: float  # GB/s of one GPU, one direction
    latency_us: float = 5.0  # of a message, software included

    def __post_init__(self) -> None:
        if not (isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ConfigError(f"a bandwidth is a number of GB/s above 0, not {self.bandwidth:g}")
        if not (isfinite(self.latency_us) and self.latency_us >= 0):
            raise ConfigError(f"latency_us is a number of microseconds from 0, not {self.latency_us:g}")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Accelerators of one kind in nodes of equal size. GPU r of the cluster is GPU r mod gpus_per_node of node r // gpus_per_node."""

    gpu: str  # row of luban/planner/accelerators.toml
    nodes: int
    gpus_per_node: int
    inside: Link | None = None  # between GPUs of a node; none: that of the accelerator's row
    between: Link | None = None  # between nodes; needed where there are several
    machine: str = ""  # file of luban bench machine; none: the table that ships for the GPU
    memory: float | None = None  # GB of a GPU that a run may use; none: 95% of the row's
    price: float | None = None  # of a GPU-hour
    currency: str = "USD"  # of the price
    pue: float = 1.1  # energy of the data centre over that of its GPUs
    topology: Topology | None = None  # of `luban simulate`, one host a GPU; none: no contention between nodes

    def __post_init__(self) -> None:
        accelerator(self.gpu)
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.nodes > 1 and self.between is None:
            raise ConfigError(f"{self.nodes} nodes need between = {{ bandwidth = … }}, GB/s of a GPU to other nodes")
        if self.gpus_per_node > 1 and self.inside is None and not accelerator(self.gpu).link:
            raise ConfigError(
                f"{self.gpu} has no link of its own: give inside = {{ bandwidth = … }}, GB/s of a GPU, such as 25 over PCIe"
            )
        for name in ("memory", "price"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value > 0):
                raise ConfigError(f"{name} is a number above 0, not {value:g}")

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def row(self) -> Accelerator:
        """The accelerator's row."""
        return accelerator(self.gpu)

    @property
    def memory_bytes(self) -> float:
        """Bytes of a GPU that a run may use."""
        return 1e9 * (self.memory if self.memory is not None else 0.95 * self.row.memory)

    @property
    def link(self) -> Link:
        """Between the GPUs of a node."""
        return self.inside or Link(bandwidth=max(self.row.link / 2, 1.0), latency_us=4.0)

    @property
    def network(self) -> Link:
        """Between nodes."""
        return self.between or self.link

    def table(self, folder: Path = Path()) -> MachineTable:
        """Speeds of the accelerator by size. A file's path is relative to `folder`."""
        found = machine_table(str(folder / self.machine) if self.machine else self.gpu)
        if found.gpu != self.gpu:
            raise ConfigError(
                f"machine {self.machine} is a table of {found.gpu}, and the cluster's GPUs are {self.gpu}"
            )
        return found


def read_cluster(path: Path) -> Cluster:
    """Read a cluster file.

    Raises:
        ConfigError: it can't be read, or what is wrong with it, with the file's name.
    """
    data = read_toml(path)
    try:
        return from_dict(Cluster, data, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
