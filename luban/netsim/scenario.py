"""A scenario: topology, switches, transport and workload as one TOML file, and what running it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from luban.core.errors import ConfigError
from luban.core.seeding import generator
from luban.netsim.congestion.base import Transport
from luban.netsim.congestion.hpcc import Hpcc
from luban.netsim.engine.flow_arrays import require_possible
from luban.netsim.engine.paths import Segments, flow_paths
from luban.netsim.flows import NEVER, Flow
from luban.netsim.simulation import TIME_IS_OVER, Outcome, Simulation
from luban.netsim.switches import Switches
from luban.netsim.topology.base import Topology
from luban.netsim.topology.network import Network
from luban.netsim.workloads.base import Workload

if TYPE_CHECKING:
    from luban.netsim.fluid_flows import FluidOutcome

WATCHED = 8  # ports whose queues are sampled


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long, and what is written down."""

    seed: int = 0  # of arrivals, paths, and the order of simultaneous events
    until_us: float = 0.0  # simulated time at which it ends; 0: when every flow has finished
    base_rtt_us: float = 0.0  # T of HPCC, PINT and µFAB; 0: the longest unloaded round trip
    sample_us: float = 1.0  # between samples of queues; 0: none
    watch: tuple[str, ...] = ()  # ports to sample, as "leaf0→host3"; by default those that most flows cross
    watch_flows: tuple[int, ...] = ()  # numbers of flows whose received bytes are sampled too
    fail_links: tuple[int, ...] = ()  # numbers of links that fail while it runs, as in ports.jsonl
    fail_at_us: float = 0.0  # when they fail
    repair_at_us: float = 0.0  # when they work again; 0: never

    def __post_init__(self):
        if 0 < self.repair_at_us <= self.fail_at_us:
            raise ConfigError("run.repair_at_us must be after run.fail_at_us")
        if min(self.repair_at_us, self.until_us, self.base_rtt_us, self.sample_us, self.fail_at_us) < 0:
            raise ConfigError("run: times must not be below 0")
        for name in ("fail_at_us", "repair_at_us"):
            if getattr(self, name) and not self.fail_links:
                raise ConfigError(f"run.{name} {getattr(self, name):g} without links: name them with run.fail_links")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything that defines a simulation."""

    title: str = ""  # what it shows, in a sentence
    topology: Topology  # hosts, switches, links
    workload: Workload  # what is sent
    transport: Transport = field(default_factory=Hpcc)  # how hosts send
    switch: Switches = field(default_factory=Switches)  # buffers, flow control, marking
    run: Run = field(default_factory=Run)  # how long, what is written down
    mode: Literal["packet", "fluid"] = "packet"  # every packet, or flows at max-min fair rates

    def prepare(self) -> Simulation:
        """The simulation, ready to run."""
        network = self.topology.network()
        flows = self.workload.flows(network, generator(self.run.seed, "workload"))
        if not flows:
            raise ConfigError("the workload has no flows: give it more load or time")
        for flow in flows:  # paths are also looked for here, so that a flow to nowhere is said before anything is built
            network.require_host(flow.src)
            network.require_host(flow.dst)
        for i in self.run.watch_flows:
            if not 0 <= i < len(flows):
                raise ConfigError(f"run.watch_flows: there is no flow {i}, only 0 to {len(flows) - 1}")
        watched = [self._port(network, name) for name in self.run.watch]
        simulation = Simulation(
            network,
            flows,
            self.transport,
            self.switch,
            seed=self.run.seed,
            base_rtt=round(self.run.base_rtt_us * 1e6) or None,
            watched_ports=watched,
            watched_flows=self.run.watch_flows,
            sample_every=round(self.run.sample_us * 1e6),
            watch_busiest=0 if watched else WATCHED,
        )
        for link in self.run.fail_links:
            if not 0 <= link < len(network.links):
                raise ConfigError(f"run.fail_links: there is no link {link}, only 0 to {len(network.links) - 1}")
        return simulation

    def execute(self, simulation: Simulation, show: bool = False) -> Outcome:
        """Run it, links failing and coming back on the way."""
        until = round(self.run.until_us * 1e6) or NEVER
        moments = [(self.run.fail_at_us, simulation.fail_link)] if self.run.fail_links else []
        if self.run.repair_at_us:
            moments.append((self.run.repair_at_us, simulation.repair_link))
        for microseconds, change in moments:
            outcome = simulation.run(min(until, round(microseconds * 1e6)), show=show)
            if outcome.reason != TIME_IS_OVER:
                return outcome
            for link in self.run.fail_links:
                change(link)
        return simulation.run(until, show=show)

    @staticmethod
    def _port(network: Network, name: str) -> int:
        a, arrow, b = name.replace("->", "→").partition("→")
        if not arrow or a not in network.names or b not in network.names:
            raise ConfigError(f'run.watch: {name!r} is not "NODE→NODE" with nodes such as {network.names[0]}')
        try:
            return network.port_between(network.names.index(a), network.names.index(b))
        except ConfigError as error:
            raise ConfigError(f"run.watch: {name!r}: {error}") from None


@dataclass(frozen=True)
class FluidRun:
    """What fluid mode has run, and what came out."""

    network: Network
    flows: list[Flow]
    outcome: FluidOutcome
    carried: np.ndarray  # (ports,) bytes of the flows that have finished


def fluid_run(scenario: Scenario, show: bool = False) -> FluidRun:
    """The scenario's flows at max-min fair rates. A flow whose packets take several paths loads each of them alike, and weights
    count where the transport shares by them; traffic classes, buffers and congestion control aren't there.

    Raises:
        ConfigError: what only packets can show.
    """
    from luban.netsim.fluid_flows import fluid_times

    if scenario.run.fail_links or scenario.run.until_us:
        raise ConfigError(
            "mode fluid runs every flow to its end over links that don't change: give --run.until_us 0, and topology.failed_links "
            "instead of run.fail_links, or use --mode packet"
        )
    network = scenario.topology.network()
    flows = scenario.workload.flows(network, generator(scenario.run.seed, "workload"))
    for i, flow in enumerate(flows):
        require_possible(i, flow, len(flows))
    segments = Segments(network, flows, scenario.run.seed)
    paths, first, counts = flow_paths(network, scenario.transport, flows, segments, scenario.run.seed)
    each = [paths[a : a + n] for a, n in zip(first.tolist(), counts.tolist(), strict=True)]
    weighted = scenario.transport.shares_by_weight
    outcome = fluid_times(network, each, flows, weighted=weighted, show=show)
    carried = np.zeros(2 * len(network.links))
    for flow, routes, finish in zip(flows, each, outcome.finish.tolist(), strict=True):
        for route in routes:
            np.add.at(carried, list(route), 0.0 if np.isnan(finish) else flow.size / len(routes))
    return FluidRun(network, flows, outcome, carried)
