"""Incast: many hosts answer one at the same time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luban.core.errors import ConfigError
from luban.netsim.flows import Flow, at_microseconds
from luban.netsim.topology.network import Network
from luban.netsim.workloads.base import Workload


@dataclass(frozen=True, kw_only=True)
class Incast(Workload):
    """`senders` hosts send to host `receiver`; a round starts when the last has ended."""

    senders: int = 0  # hosts that answer; 0: all others
    receiver: int = 0  # host that is answered
    bytes: int = 1_000_000  # of each sender and round
    per_sender: int = 1  # flows of each sender at once
    rounds: int = 1  # one after the other
    gap_us: float = 0.0  # between the starts of successive senders

    def flows(self, network: Network, rng: np.random.Generator) -> list[Flow]:
        """The senders are the other hosts, as far from the receiver as possible in host numbers."""
        hosts = len(network.hosts)
        if not 0 <= self.receiver < hosts:
            raise ConfigError(f"workload.receiver {self.receiver}: there are hosts 0 to {hosts - 1}")
        if not 0 <= self.senders < hosts:
            raise ConfigError(
                f"workload.senders must be from 1 to {hosts - 1}, the other hosts of this topology, or 0 for all of them; "
                f"{self.senders} given"
            )
        count = self.senders or hosts - 1
        if self.rounds < 1 or self.per_sender < 1 or self.bytes < 0:
            raise ConfigError("workload.rounds and workload.per_sender must be at least 1, workload.bytes at least 0")
        senders = [(self.receiver + 1 + i * (hosts - 1) // count) % hosts for i in range(count)]
        flows: list[Flow] = []
        for round_ in range(self.rounds):
            before = tuple(range(len(flows) - count * self.per_sender, len(flows))) if round_ else ()
            for i, sender in enumerate(senders * self.per_sender):
                start = at_microseconds(i * self.gap_us)
                flows.append(
                    Flow(sender, self.receiver, self.bytes, start=start, after=before, label=f"round {round_}")
                )
        return flows
