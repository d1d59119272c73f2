"""A job, and what goes on beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luban.core.errors import ConfigError
from luban.netsim.engine.layout import CLASSES
from luban.netsim.flows import Flow
from luban.netsim.topology.network import Network
from luban.netsim.workloads.base import Workload


@dataclass(frozen=True, kw_only=True)
class Mixed(Workload):
    """Two workloads at once, each in a traffic class."""

    job: Workload  # what is looked at
    beside: Workload  # what is sent besides
    job_class: int = 1  # traffic class of the job's flows
    beside_class: int = 1  # traffic class of the others

    def flows(self, network: Network, rng: np.random.Generator) -> list[Flow]:
        """The flows of the job, then the others, labelled so."""
        for name in ("job_class", "beside_class"):
            if not 1 <= getattr(self, name) < CLASSES:
                raise ConfigError(f"workload.{name} must be from 1 to {CLASSES - 1}, {getattr(self, name)} given")
        flows = self.job.flows(network, rng)
        for flow in flows:
            flow.cls, flow.label = self.job_class, flow.label or "job"
        offset = len(flows)
        for flow in self.beside.flows(network, rng):
            flow.cls, flow.label = self.beside_class, "beside"
            flow.after = tuple(n + offset for n in flow.after)
            flow.since = None if flow.since is None else flow.since + offset
            flows.append(flow)
        return flows
