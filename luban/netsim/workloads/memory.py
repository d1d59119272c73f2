"""Memory read and written over the network, at the network card or behind it (NetDAM, Fang and Peng 2021).

An operation is a question, its service at the memory, and an answer:

| operation | question carries | service | answer carries |
|---|---|---|---|
| read | an address | one access | the data |
| write | the data | one access | nothing |
| atomic | an address and an operand | an access to read and one to write | the old value |
| reduce | the data, to be added to what is there | the same, and the addition at the rate of the port | nothing |

An access that meets the memory's refresh waits for its end. Refreshes of length `refresh_ns` come each `refresh_every_ns`
(tRFC and tREFI of DDR4 by default); an operation comes at a random moment between two. Operations don't wait for each other at the
memory, whose bandwidth is above the port's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from luban.core.errors import ConfigError
from luban.netsim.flows import Flow, at_microseconds
from luban.netsim.topology.network import Network
from luban.netsim.workloads.base import Workload

ADDRESS, OPERAND = 16, 8  # bytes
NANOSECOND = 1000  # ps
ACCESSES = {"read": 1, "write": 1, "atomic": 2, "reduce": 2}


@dataclass(frozen=True, kw_only=True)
class Memory(Workload):
    """Operations of some hosts on the memories of others."""

    operation: Literal["read", "write", "atomic", "reduce"] = "read"
    bytes: int = 128  # of data: 32 fp32
    target: str = "card-memory"  # what the names of the memories start with
    client: str = "gpu"  # what the names of the hosts that ask start with
    clients: int = 1  # the first of them
    count: int = 1000  # operations of each client
    gap_us: float = 5.0  # between two of a client, in the mean
    fixed_ns: float = 0.0  # the card's own time for an operation
    access_ns: float = 45.0  # of the memory
    refresh_ns: float = 350.0
    refresh_every_ns: float = 7800.0
    alu_gbps: float = 100.0  # reduce: bits a nanosecond that are added

    def flows(self, network: Network, rng: np.random.Generator) -> list[Flow]:
        """Three flows an operation: question, service, answer."""
        if self.bytes < 1 or min(self.clients, self.count) < 1 or self.gap_us < 0:
            raise ConfigError("workload.bytes, clients and count must be at least 1, gap_us at least 0")
        if (
            not 0 <= self.refresh_ns < self.refresh_every_ns
            or min(self.fixed_ns, self.access_ns) < 0
            or self.alu_gbps <= 0
        ):
            raise ConfigError(
                "workload: refresh_ns from 0 to below refresh_every_ns, times at least 0, alu_gbps above 0"
            )
        names = [network.names[node] for node in network.hosts]
        clients = [host for host, name in enumerate(names) if name.startswith(self.client)][: self.clients]
        targets = [host for host, name in enumerate(names) if name.startswith(self.target)]
        if len(clients) < self.clients or not targets:
            raise ConfigError(
                f"workload: {self.clients} hosts {self.client}… and a memory {self.target}… are needed; the topology has "
                f"{', '.join(names[:3])}, …, {names[-1]}"
            )
        flows: list[Flow] = []
        for i, client in enumerate(clients):
            target = targets[-1 - i % len(targets)]
            starts = np.cumsum(rng.exponential(self.gap_us, self.count))
            for start in starts:
                self._operation(flows, client, target, at_microseconds(float(start)), rng)
        return flows

    def _operation(self, flows: list[Flow], client: int, target: int, start: int, rng: np.random.Generator) -> None:
        first = len(flows)
        question = {"read": ADDRESS, "atomic": ADDRESS + OPERAND}.get(self.operation, ADDRESS + self.bytes)
        answer = {"read": self.bytes, "atomic": OPERAND}.get(self.operation, 1)
        flows.append(Flow(client, target, question, start=start, label="question"))
        flows.append(Flow(target, target, 0, after=(first,), duration=self._service(rng), label="service"))
        flows.append(Flow(target, client, answer, after=(first + 1,), since=first, label=self.operation))

    def _service(self, rng: np.random.Generator) -> int:
        """ps at the memory."""
        total = self.fixed_ns
        for _ in range(ACCESSES[self.operation]):
            into = float(rng.uniform(0, self.refresh_every_ns))
            total += self.access_ns + max(self.refresh_ns - into, 0.0)
        if self.operation == "reduce":
            total += 8 * self.bytes / self.alu_gbps
        return round(total * NANOSECOND)
