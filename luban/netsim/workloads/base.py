"""Workloads as configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from luban.core.registry import Registry, Variant
from luban.netsim.flows import Flow
from luban.netsim.topology.network import Network

_AT = "luban.netsim.workloads."


@dataclass(frozen=True, kw_only=True)
class Workload(Variant):
    """What is sent."""

    registry: ClassVar[Registry] = Registry(
        "workload",
        {
            "flows": _AT + "explicit:Flows",
            "incast": _AT + "incast:Incast",
            "permutation": _AT + "permutation:Permutation",
            "poisson": _AT + "poisson:Poisson",
            "collective": _AT + "collective:Collective",
            "memory": _AT + "memory:Memory",
            "mixed": _AT + "mixed:Mixed",
            "training_step": _AT + "training_step:TrainingStep",
        },
    )

    def flows(self, network: Network, rng: np.random.Generator) -> list[Flow]:
        """The flows over a network.

        Raises:
            ConfigError, DataError: more hosts are needed than there are, or a host that doesn't exist.
        """
        raise NotImplementedError
