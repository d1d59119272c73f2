"""Times of collectives on one level of links by closed form, by fluid rates and by packets, from two fitted constants.

A ring over N processes takes s(N − 1) steps of alpha + K/N·beta each: s is 2 for an all-reduce, 1 for an all-gather or a reduce-scatter.
The parts of an all-to-all go out together: alpha + (N − 1)/N·K·beta. K: bytes of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from luban.core.errors import UsageError

if TYPE_CHECKING:
    from luban.netsim.topology.network import Network
    from luban.netsim.workloads.base import Workload

SWEEPS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}  # how often a ring is gone round
SIMULATED = {
    "all_reduce": "ring",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "all_to_all": "all_to_all",
}
PACKETS = 64  # that a part is cut into: as a network card's messages, not its frames
GIGABIT = 8e-9


@dataclass(frozen=True)
class Links:
    """Every process with a link of its own to all others.

    Args:
        alpha: seconds before each message.
        beta: seconds a byte.
    """

    processes: int
    alpha: float
    beta: float

    def closed_form(self, collective: str, size: int) -> float:
        """Seconds."""
        part = size / self.processes
        if collective == "all_to_all":
            return self.alpha + (self.processes - 1) * part * self.beta
        return SWEEPS[collective] * (self.processes - 1) * (self.alpha + part * self.beta)

    def fluid(self, collective: str, size: int) -> float:
        """Seconds at max-min fair rates, flow by flow."""
        from luban.netsim.fluid_flows import fluid_times

        network, rng = self._network(), np.random.default_rng(0)
        flows = self._work(collective, size).flows(network, rng)
        paths = [[network.hashed_path(flow.src, flow.dst, rng)] for flow in flows]
        return float(fluid_times(network, paths, flows).finish.max())

    def packets(self, collective: str, size: int) -> float:
        """Seconds, each part in `PACKETS` packets through one switch that stores and forwards."""
        from luban.netsim.congestion.constant import Constant
        from luban.netsim.simulation import Simulation
        from luban.netsim.switches import Switches

        n, network, work = self.processes, self._network(), self._work(collective, size)
        payload = max(size // n // PACKETS, 1)
        transport = Constant(payload=payload, header=1, ack_size=1, rto_us=1e9)
        switches = Switches(buffer_bytes=64 * n * (payload + 1) + (1 << 20))
        simulation = Simulation(network, work.flows(network, np.random.default_rng(0)), transport, switches)
        simulation.run()
        return simulation.makespan()

    def _network(self) -> Network:
        """A switch that all processes hang on."""
        from luban.netsim.topology.clos import Star

        return Star(hosts=self.processes, host_gbps=GIGABIT / self.beta, delay_us=0.0).network()

    def _work(self, collective: str, size: int) -> Workload:
        """The flows of a collective, each `alpha` after what it waits for."""
        from luban.netsim.workloads.collective import Collective

        return Collective(algorithm=SIMULATED[collective], bytes=size, alpha_us=1e6 * self.alpha)  # type: ignore[arg-type]


def fit(processes: int, sizes: Sequence[int], seconds: Sequence[float]) -> Links:
    """The links whose all-reduces of these sizes take closest to these seconds, by the sum of squared relative errors.

    Raises:
        UsageError: fewer than two sizes.
    """
    if len(set(sizes)) < 2:
        raise UsageError("a fit of two constants needs two sizes at least")
    steps = 2 * (processes - 1)
    terms = np.array([[steps, steps / processes * size] for size in sizes]) / np.array(seconds)[:, None]
    alpha, beta = np.linalg.lstsq(terms, np.ones(len(sizes)), rcond=None)[0]
    if alpha < 0:
        alpha, beta = 0.0, terms[:, 1].sum() / (terms[:, 1] ** 2).sum()
    elif beta <= 0:
        raise UsageError("times don't grow with the size: larger sizes are needed to fit a bandwidth")
    return Links(processes, float(alpha), float(beta))
