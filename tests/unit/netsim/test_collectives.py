"""Collectives against their closed forms, and what each of their flows carries."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.netsim.collectives import halving_doubling, hierarchical, pairwise, ring
from luban.netsim.collectives.schedule import Schedule
from luban.netsim.congestion.constant import Constant
from luban.netsim.simulation import Simulation
from luban.netsim.topology.bigraph import BiGraph, halving_doubling_hosts
from luban.netsim.topology.clos import Star
from luban.netsim.topology.rails import Rails
from luban.netsim.topology.torus import Torus
from luban.netsim.workloads.collective import Collective
from luban.netsim.workloads.training_step import TrainingStep
from luban.planner.pipeline.tables import table_of
from luban.planner.pipeline.timeline import timeline

BYTE = 8 / 100e9  # seconds at 100 Gb/s
RNG = np.random.default_rng(0)


def seconds(network, workload, payload=4096, header=1):
    transport = Constant(payload=payload, header=header, ack_size=1)  # what isn't data costs next to nothing
    simulation = Simulation(network, workload.flows(network, RNG), transport)
    assert simulation.run().complete
    return simulation.makespan()


def test_ring_all_reduce_of_100_mb_on_8_ranks():
    network = Star(hosts=8, delay_us=0.5).network()
    assert seconds(network, Collective(algorithm="ring", bytes=10**8)) == pytest.approx(14.014e-3, rel=0.01)


def test_two_rings_at_once_use_both_halves_of_nothing_more_than_one_port():
    network = Star(hosts=8, delay_us=0.5).network()
    one = seconds(network, Collective(algorithm="ring", bytes=10**7))
    assert seconds(network, Collective(algorithm="bidirectional_ring", bytes=10**7)) == pytest.approx(one, rel=0.02)


@pytest.mark.parametrize(("algorithm", "expected"), [("ring", 787.5e-6), ("halving_doubling", 217.5e-6)])
def test_a_ring_pays_latency_where_halving_doubling_does_not(algorithm, expected):
    network = Star(hosts=64, delay_us=0.0).network()
    workload = Collective(algorithm=algorithm, bytes=10**6, alpha_us=5.0)
    assert seconds(network, workload, payload=1000) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("ranks", [5, 6, 12])
def test_halving_doubling_folds_other_numbers_of_ranks(ranks):
    power = 1 << (ranks.bit_length() - 1)
    steps = 2 * (power.bit_length() - 1)
    expected = steps * 5e-6 + 2 * (1 - 1 / power) * 4e6 * BYTE + 2 * 5e-6 + 2 * 4e6 * BYTE
    network = Star(hosts=ranks, delay_us=0.0).network()
    workload = Collective(algorithm="halving_doubling", bytes=4_000_000, alpha_us=5.0)
    assert seconds(network, workload) == pytest.approx(expected, rel=0.01)


def test_recursive_doubling_and_trees():
    network = Star(hosts=16, delay_us=0.0).network()
    doubled = seconds(network, Collective(algorithm="recursive_doubling", bytes=10**6, alpha_us=5.0), payload=1000)
    assert doubled == pytest.approx(4 * (5e-6 + 1e6 * BYTE), rel=0.01)
    # A parent sends to two children over one port: a chunk takes twice its time on the way down and up.
    network = Star(hosts=15, delay_us=0.0).network()
    chunks = 32
    chunk = 2 * 16e6 * BYTE / chunks
    found = seconds(network, Collective(algorithm="tree", bytes=16_000_000, chunks=chunks))
    assert 2 * chunks / 2 * chunk < found < 2 * (3 + chunks - 1) * chunk


def test_hierarchical_all_reduce_over_nvlink_and_rails():
    network = Rails(servers=4, gpus=8, delay_us=0.0, nvlink_delay_us=0.0).network()
    m, g, s = 16e6, 8, 4
    expected = 2 * (g - 1) / g * m * 8 / 3600e9 + 2 * (s - 1) / s * m / g * 8 / 400e9
    workload = Collective(algorithm="hierarchical", bytes=int(m), group=g)
    assert seconds(network, workload) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("at_once", [1, 3, 6])
def test_torus_all_reduce_uses_one_three_or_six_ports(at_once):
    k, m = 3, 10_800_000
    network = Torus(x=k, y=k, z=k, delay_us=0.0).network()
    workload = Collective(algorithm="torus", bytes=m, shape=(k, k, k), at_once=at_once)
    expected = 2 * (1 - 1 / k**3) * m * BYTE / at_once
    assert seconds(network, workload) == pytest.approx(expected, rel=0.03)


def test_all_to_all_is_limited_by_the_port():
    network = Star(hosts=8, delay_us=0.5).network()
    assert seconds(network, Collective(algorithm="all_to_all", bytes=8_000_000)) == pytest.approx(7e6 * BYTE, rel=0.05)


@pytest.mark.parametrize("ranks", [8, 32, 128, 512, 2048])
def test_the_rank_mapping_puts_one_flow_at_most_on_each_link(ranks):
    """Every exchange of halving-doubling over the links of the BiGraph itself, those of the hosts too."""
    hosts, size = halving_doubling_hosts(ranks), 1 << ((ranks.bit_length() - 2) // 2)
    assert sorted(hosts) == list(range(ranks))
    network = BiGraph(switches=size, hosts_per_switch=size).network()
    for step in range(ranks.bit_length() - 1):
        paths = [network.hashed_path(hosts[rank], hosts[rank ^ (1 << step)], RNG) for rank in range(ranks)]
        assert {len(path) for path in paths} == {3}  # host, switch, switch of the other side, host
        assert max(Counter(port for path in paths for port in path).values()) == 1


def test_the_mapping_makes_halving_doubling_run_at_line_rate_on_a_bigraph():
    network = BiGraph(switches=4, hosts_per_switch=4, delay_us=0.0).network()
    mapped = Collective(algorithm="halving_doubling", bytes=4_000_000, placement="halving_doubling")
    ideal = 2 * 31 / 32 * 4e6 * BYTE
    assert seconds(network, mapped, payload=1000) == pytest.approx(ideal, rel=0.03)
    assert seconds(network, Collective(algorithm="halving_doubling", bytes=4_000_000)) > 1.3 * ideal


def test_every_rank_ends_with_everyones_contribution():
    """What arrives, followed through each graph: contributions are sets of ranks, one a piece."""
    for ranks in (2, 5, 8):
        schedule = Schedule(list(range(ranks)))
        ring.ring_all_reduce(schedule, ranks * 10)
        held = [[{r} for _ in range(ranks)] for r in range(ranks)]
        for step in range(2 * (ranks - 1)):
            flows = schedule.flows[step * ranks : (step + 1) * ranks]
            moved = [(f.src, f.dst, (f.src - step) % ranks) for f in flows]
            sent = [held[src][piece].copy() for src, _, piece in moved]
            for (_, dst, piece), what in zip(moved, sent, strict=True):
                held[dst][piece] = what | (held[dst][piece] if step < ranks - 1 else set())
        assert all(piece == set(range(ranks)) for pieces in held for piece in pieces)
        assert sum(f.size for f in schedule.flows) == 2 * (ranks - 1) * ranks * 10


def test_pipelines_and_broadcasts():
    schedule = Schedule(list(range(4)))
    pairwise.pipeline(schedule, 1000, microbatches=6, forward=10**9, backward=2 * 10**9)
    simulation = Simulation(Star(hosts=4).network(), schedule.flows, Constant())
    simulation.run()
    assert simulation.makespan() == pytest.approx((6 + 4 - 1) * 3e-3, rel=0.01)
    schedule = Schedule(list(range(9)))
    Collective(algorithm="broadcast", bytes=9000, chunks=3).add_to(schedule)
    assert {f.dst for f in schedule.flows} == set(range(1, 9))


def test_a_step_with_overlap_hides_communication_and_a_slow_rank_delays_all():
    network = Star(hosts=8).network()

    def step(**fields):
        workload = TrainingStep(plan=ParallelPlan(replicate=8), layers=6, **fields)
        simulation = Simulation(network, workload.flows(network, RNG), Constant(payload=4096))
        assert simulation.run().complete
        return simulation.makespan()

    compute = 6 * 1.5e-3
    small = step(layer_bytes=1_000_000)
    assert compute < small < compute + 1.2 * (2 * 7 / 8 * 1e6 * BYTE) + 1e-4  # only the last layer's reduction shows
    large = step(layer_bytes=40_000_000)
    assert large > 6 * 2 * 7 / 8 * 40e6 * BYTE  # communication is the limit
    assert step(layer_bytes=1_000_000, slow_rank=3) > 1.9 * compute


@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(tensor=2, pipeline=2, replicate=2, microbatches=3),
        ParallelPlan(shard=4, context=2),
        ParallelPlan(pipeline=8),
    ],
)
def test_plans_of_all_kinds_run_to_their_end(plan):
    network = Rails(servers=1, gpus=8).network()
    workload = TrainingStep(plan=plan, layers=8, layer_bytes=1_000_000, activation_bytes=100_000)
    compute = plan.microbatches * 8 * 1.5e-3 / plan.pipeline / (plan.tensor * plan.context)
    assert seconds(network, workload) > compute


@pytest.mark.parametrize(("zero", "gathers"), [(1, 1), (2, 1), (3, 2)])
def test_shards_send_the_bytes_of_their_stage_of_zero(zero, gathers):
    """(N − 1)/N of all gradients, scattered, and of all weights, gathered once or before both passes; copies sum their parts."""
    plan, layers, network = ParallelPlan(replicate=2, shard=4, zero=zero), 6, Star(hosts=8).network()
    workload = TrainingStep(plan=plan, layers=layers, layer_bytes=800_000, weight_bytes=400_000, activation_bytes=1000)
    sent = Counter()
    for flow in workload.flows(network, RNG):
        sent[flow.label] += flow.size
    share = 3 / 4 * 8  # of every process
    assert sent["gradients"] == layers * (share * 800_000 + 2 * 1 / 2 * 800_000 / 4 * 8)
    assert sent["weights"] == layers * gathers * share * 400_000


def test_weights_are_gathered_while_the_layer_before_computes():
    network = Star(hosts=8).network()
    plans = {zero: ParallelPlan(shard=8, zero=zero) for zero in (2, 3)}
    sizes = {"layers": 12, "layer_bytes": 80_000, "weight_bytes": 1_000_000}
    found = {zero: seconds(network, TrainingStep(plan=plan, **sizes)) for zero, plan in plans.items()}
    compute, gather = 12 * 1.5e-3, 7 / 8 * 1e6 * BYTE
    assert compute + gather <= found[3] < compute + 2 * gather  # all but the first is hidden


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "micro"), [(2, 2), (3, 5), (4, 4), (4, 9), (5, 2)])
def test_stages_work_in_the_order_and_time_of_the_plan(kind, stages, micro):
    """Against the planner's tables and its interpreter of them, where messages take no time; activations take some."""
    network = Star(hosts=stages, host_gbps=100_000.0, delay_us=0.0).network()
    plan = ParallelPlan(pipeline=stages, microbatches=micro, schedule=kind)
    workload = TrainingStep(plan=plan, layers=stages, activation_bytes=1, layer_bytes=1)
    flows = workload.flows(network, RNG)
    orders = [[f.duration for f in flows if f.duration and f.src == rank] for rank in range(stages)]
    table = table_of(plan, micro)
    for rank, actions in enumerate(table):  # two works a pass
        expected = [1e9 * (0.25 if a.kind == "F" else 0.5) for a in actions for _ in range(2)]
        assert orders[rank] == expected
    ideal = timeline(table, stages, {"F": 1, "B": 2}).length * 0.5e-3
    assert seconds(network, workload) == pytest.approx(ideal, rel=1e-3)
    # What crosses the network shows in 1F1B, whose stages wait for each other in turn, and less under GPipe.
    slow = {
        schedule: seconds(
            Star(hosts=stages).network(),
            replace(workload, plan=replace(plan, schedule=schedule), activation_bytes=2_000_000),
        )
        for schedule in ("gpipe", "1f1b")
    }
    assert ideal < slow["gpipe"] < slow["1f1b"] + 1e-9
    assert micro < 4 or slow["gpipe"] < slow["1f1b"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"plan": ParallelPlan(replicate=4, remat="full")}, "workload.plan.remat full is not simulated"),
        ({"plan": ParallelPlan(replicate=4, interleave=3)}, "workload.plan.interleave 3 is not simulated"),
        ({"plan": ParallelPlan(pipeline=2, stage_layers=(1, 4))}, "workload.plan.stage_layers"),
        ({"plan": ParallelPlan(shard=2, expert=2)}, "workload.plan.expert 2 is not simulated"),
        ({"slow_rank": 99}, "workload.slow_rank 99 must be one of the plan's ranks, 0 to 7"),
        ({"slow_rank": -2}, "workload.slow_rank -2"),
        ({"bucket_layers": 0}, "workload.bucket_layers must be at least 1"),
    ],
)
def test_what_a_step_does_not_simulate_is_refused_by_name(fields, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        TrainingStep(**fields).flows(Star(hosts=8).network(), RNG)


def test_bad_collectives_are_refused():
    network = Star(hosts=8).network()
    with pytest.raises(ConfigError, match="from 2 to 8"):
        Collective(ranks=9).flows(network, RNG)
    with pytest.raises(ConfigError, match="needs 16 devices, and the cluster has 8"):
        TrainingStep(plan=ParallelPlan(replicate=16)).flows(network, RNG)
    with pytest.raises(ConfigError, match="schedule interleaved is not simulated"):
        plan = ParallelPlan(pipeline=2, schedule="interleaved", microbatches=2)
        TrainingStep(plan=plan).flows(network, RNG)
    with pytest.raises(ConfigError, match="2, 4, 8"):
        halving_doubling.recursive_doubling_all_reduce(Schedule(list(range(6))), 10)
    with pytest.raises(ConfigError, match="don't divide"):
        hierarchical.hierarchical_all_reduce(Schedule(list(range(8))), 10, 3)
    with pytest.raises(ConfigError, match="2, 8, 32"):
        halving_doubling_hosts(16)
