"""NetDAM's operations on memory at the network card, beside main memory behind PCIe."""

import json

import numpy as np
import pytest

from luban.cli.main import main
from luban.core.errors import ConfigError
from luban.netsim.congestion.constant import Constant
from luban.netsim.simulation import Simulation
from luban.netsim.topology.servers import Servers
from luban.netsim.workloads.memory import ADDRESS, OPERAND, Memory

SERVERS = Servers(servers=2, gpus=1, nics=1, pcie_switches=1, nic_memory_gbps=400.0, delay_us=0.01)


def wire(sizes, rates=(400, 100, 100, 400), delays=(0, 1e-8, 1e-8, 0)):
    """Seconds of packets of these bytes of data, one after the other, between two cards."""
    return sum(sum((size + 48) * 8 / (rate * 1e9) for rate in rates) + sum(delays) for size in sizes)


@pytest.mark.parametrize(
    ("operation", "there", "back", "service"),
    [
        ("read", ADDRESS, 128, 45),
        ("write", ADDRESS + 128, 1, 45),
        ("atomic", ADDRESS + OPERAND, OPERAND, 90),
        ("reduce", ADDRESS + 128, 1, 90 + 8 * 128 / 100),
    ],
)
def test_an_operation_takes_question_service_and_answer(operation, there, back, service):
    network = SERVERS.network()
    work = Memory(
        operation=operation, client="card-memory0", target="card-memory1", count=3, refresh_ns=0.0, fixed_ns=100.0
    )
    flows = work.flows(network, np.random.default_rng(0))
    simulation = Simulation(network, flows, Constant())
    assert simulation.run().complete
    took = simulation.completion_times()[2::3]
    assert took == pytest.approx(wire((there, back)) + (100 + service) * 1e-9, abs=2e-12)


def test_the_wait_for_a_refresh_has_the_mean_and_deviation_of_its_distribution():
    """A refresh of t in each T is met with probability t/T, and then t/2 is left in the mean."""
    network = SERVERS.network()
    work = Memory(client="card-memory0", target="card-memory1", count=20_000, refresh_ns=350.0, refresh_every_ns=7800.0)
    service = np.array([f.duration / 1000 - 45 for f in work.flows(network, np.random.default_rng(1)) if f.duration])
    p, t = 350 / 7800, 350.0
    assert service.mean() == pytest.approx(p * t / 2, rel=0.05)
    assert service.std() == pytest.approx(np.sqrt(p * t**2 / 3 - (p * t / 2) ** 2), rel=0.05)
    assert 300 < service.max() <= t


def test_memory_on_the_card_is_nearer_and_does_not_feel_what_the_host_loads(capsys):
    assert main(["simulate", "netdam", "--json", "--workload.job.count", "1500", "--run.until_us", "7000"]) == 0
    card, busy_card, host, busy_host = json.loads(capsys.readouterr().out).values()
    assert card["mean"] == pytest.approx(618e-9, rel=0.02)  # fitted, by one constant
    assert card["deviation"] == pytest.approx(39e-9, rel=0.25) and card["max"] < 1.1 * 920e-9  # published; not fitted
    assert busy_card["mean"] == pytest.approx(card["mean"], rel=0.01)
    assert busy_card["deviation"] == pytest.approx(card["deviation"], rel=0.02)
    assert host["mean"] > card["mean"] + 4 * 100e-9  # two PCIe links there, two back
    assert busy_host["mean"] > 1.3 * host["mean"] and busy_host["deviation"] > 10 * card["deviation"]


def test_what_memory_refuses():
    network = SERVERS.network()
    for wrong, said in (
        ({"target": "nowhere"}, "a memory nowhere"),
        ({"clients": 9}, "9 hosts gpu"),
        ({"refresh_ns": 8000.0}, "refresh_ns"),
        ({"count": 0}, "count"),
    ):
        with pytest.raises(ConfigError, match=said):
            Memory(**wrong).flows(network, np.random.default_rng(0))
