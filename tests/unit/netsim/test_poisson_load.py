"""The load that `poisson` offers is that of the network cards, whatever joins GPUs inside of a server."""

import numpy as np
import pytest

from luban.netsim.topology.rails import Rails
from luban.netsim.workloads.poisson import Poisson


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_nvlink_changes_nothing_of_the_load(seed):
    workload = Poisson(sizes="hadoop", load=0.4, duration_us=2000.0, incast_load=0.05, incast_senders=8)
    drawn = [
        workload.flows(Rails(servers=2, nvlink_gbps=nvlink).network(), np.random.default_rng(seed))
        for nvlink in (0.0, 3600.0)
    ]
    assert drawn[0] == drawn[1] and len(drawn[0]) > 100


def test_the_load_is_the_share_asked_for_of_the_cards_bandwidth():
    network = Rails(servers=2, gpus=4, nic_gbps=200.0).network()
    assert network.nic_rate() == 200_000
    flows = Poisson(sizes="storage", load=0.3, duration_us=20_000.0).flows(network, np.random.default_rng(5))
    could = 8 * 200e9 / 8 * 20_000e-6  # bytes: hosts, bytes a second of each, seconds
    sizes = np.array([flow.size for flow in flows], float)
    # A compound Poisson sum deviates by the root of (how many · mean square of a size).
    assert abs(sizes.sum() - 0.3 * could) < 5 * np.sqrt((sizes**2).sum()) < 0.2 * 0.3 * could
