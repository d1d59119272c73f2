"""Small networks and runs that several tests share."""

import itertools

from luban.netsim.flows import Flow
from luban.netsim.simulation import Simulation
from luban.netsim.topology.clos import Star

MILLISECOND = 10**9  # ps
MICROSECOND = 10**6


def incast(senders, transport, switches, *, gbps=100.0, delay_us=1.0, size=10**10, until=None, seed=0, starts=None):
    """`senders` hosts send to host 0 over one switch; returns the simulation after its run, queues and flows sampled."""
    network = Star(hosts=senders + 1, host_gbps=gbps, delay_us=delay_us).network()
    flows = [Flow(i + 1, 0, size, start=starts[i] if starts else 0) for i in range(senders)]
    simulation = Simulation(
        network,
        flows,
        transport,
        switches,
        seed=seed,
        watched_ports=[1],
        watched_flows=range(senders),
        sample_every=MICROSECOND,
    )
    simulation.run(*([until] if until else []))
    return simulation


def jain(rates):
    """Jain's fairness index."""
    return rates.sum() ** 2 / (len(rates) * (rates**2).sum())


def path_through(network, src, nodes, dst):
    """A source route: host, the given nodes one after the other, host."""
    stops = [network.hosts[src], *nodes, network.hosts[dst]]
    return tuple(network.port_between(a, b) for a, b in itertools.pairwise(stops))
