"""Rematerialisation with offloading: never slower than without, the limits of bandwidth, memory replayed in time."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from luban.core.errors import ConfigError
from luban.planner.remat.chain import Chain, Operation, save_everything, simulate
from luban.planner.remat.pofo import lives, offload, pofo
from luban.planner.remat.pofo_program import State, _Program
from luban.planner.remat.rotor import RotorTable, rotor
from luban.planner.remat.sqrt_segments import sqrt_segments


def _random_costs(rng, stages):
    outputs = [rng.randint(1, 5) for _ in range(stages)]
    return {
        "forward": [rng.randint(1, 6) for _ in range(stages)],
        "backward": [rng.randint(1, 9) for _ in range(stages)],
        "output_size": outputs,
        "saved_size": [x + rng.randint(0, 6) for x in outputs],
        "input_size": rng.randint(0, 5),
        "forward_temp": [rng.randint(0, 4) for _ in range(stages)],
        "backward_temp": [rng.randint(0, 4) for _ in range(stages)],
    }


def _replayed(chain, schedule, bandwidth):
    """(seconds, peak) of a schedule, by its rules alone: every tensor is in memory for an interval of time, from its start (or
    the start of its way back) until it is freed (or has left)."""
    time, out_free, in_free, starts, ends = 0.0, 0.0, 0.0, [], []
    left, fetched, arrived = {}, {}, {}
    for k, op in enumerate(schedule.operations):
        for t in sorted(schedule.transfers, key=lambda t: (t.after, t.gone)):
            if t.after == k - 1:
                out_free = left[t] = max(out_free, time) + t.size / bandwidth
        time = max([time, *(left[t] for t in schedule.transfers if t.gone == k)])
        for t in (t for t in sorted(schedule.transfers, key=lambda t: t.needed) if t.back == k):
            fetched[t] = time
            in_free = arrived[t] = max(in_free, time) + t.size / bandwidth
        time = max([time, *(arrived[t] for t in schedule.transfers if t.needed == k)])
        starts.append(time)
        time += 0 if op.action == "loss" else chain.seconds(op.stage)[op.action == "backward"]
        ends.append(time)
    intervals = []
    for tensor in lives(chain, schedule.operations):
        if tensor.first >= len(starts):
            continue
        whole = (starts[tensor.first], ends[tensor.last])
        away = [t for t in schedule.transfers if t.name == tensor.name and tensor.first <= t.gone <= tensor.last]
        parts = [(whole[0], left[t], fetched[t], whole[1]) for t in away]
        assert len(parts) <= 1 and all(a <= b <= c <= d for a, b, c, d in parts)
        intervals += [(lo, hi, tensor.size) for p in parts for lo, hi in (p[:2], p[2:])] or [(*whole, tensor.size)]
    temps = [chain.temps(op.stage)[op.action == "backward"] for op in schedule.operations]
    moments = [((a + b) / 2, temp) for a, b, temp in zip(starts, ends, temps, strict=True) if b > a]
    peak = max(temp + sum(size for lo, hi, size in intervals if lo < at < hi) for at, temp in moments)
    return time, peak


@pytest.mark.parametrize("seed", range(10))
def test_never_slower_than_rotor_and_within_the_budget(seed):
    rng = random.Random(seed)
    costs = _random_costs(rng, rng.randint(2, 12))
    chain = Chain(**costs)
    budget, bandwidth = rng.uniform(0.4, 1.0) * save_everything(chain).peak, rng.choice([0.3, 1.0, 5.0])
    try:
        without = rotor(**costs, budget=budget).makespan
    except ConfigError:
        without = float("inf")
    try:
        found = pofo(chain, budget, bandwidth)
    except ConfigError:
        assert without == float("inf")
        return
    assert found.makespan <= without and found.peak <= budget + 1e-9
    simulate(chain, found.operations)  # the operations alone are a schedule
    seconds, peak = _replayed(chain, found, bandwidth)
    assert seconds == pytest.approx(found.makespan) and peak <= budget + 1e-9
    if without < float("inf"):
        for small in (0.0, 1e-9):
            assert pofo(chain, budget, small).makespan == without


def test_without_limit_of_bandwidth_there_is_no_overhead():
    rng = random.Random(31)
    for _ in range(5):
        chain = Chain(**{**_random_costs(rng, 10), "forward_temp": (), "backward_temp": ()})
        full = save_everything(chain)
        alone = max(2 * s + 2 * x for s, x in zip(chain.saved_size, chain.output_size, strict=True))
        found = pofo(chain, max(alone, 0.4 * full.peak), 1e15)
        assert found.makespan == pytest.approx(full.makespan, rel=1e-9)


def test_a_fifth_of_the_memory_for_less_than_a_fifth_of_the_time():
    """With a link that carries half of what forward passes produce meanwhile."""
    chain = Chain(forward=[1] * 24, backward=[2] * 24, output_size=[1] * 24, saved_size=[16] * 24)
    full = save_everything(chain)
    found = pofo(chain, full.peak / 4, 8.0)
    assert found.peak <= full.peak / 4 and found.makespan < 1.2 * full.makespan
    assert found.makespan < rotor([1] * 24, [2] * 24, [1] * 24, [16] * 24, full.peak / 4).makespan


def test_lives_count_the_memory_that_the_simulator_counts():
    rng = random.Random(32)
    for stages in (1, 3, 9):
        costs = _random_costs(rng, stages)
        chain = Chain(**costs)
        for schedule in (save_everything(chain), sqrt_segments(chain)):
            memory = [chain.temps(op.stage)[op.action == "backward"] for op in schedule.operations]
            for tensor in lives(chain, schedule.operations):
                for k in range(tensor.first, tensor.last + 1):
                    memory[k] += tensor.size
            assert max(*memory, chain.x(0)) == schedule.peak


def test_one_transfer_by_hand():
    """Three stages that save 10 each, in 24: while the last one saves its own, the first's 10 have left."""
    chain = Chain(forward=[1, 1, 1], backward=[1, 1, 1], output_size=[1, 1, 1], saved_size=[10, 10, 10], input_size=0)
    found = offload(chain, save_everything(chain).operations, 24, 5.0)
    assert found is not None and [t.name for t in found.transfers] == [("saved", 0)]
    (transfer,) = found.transfers
    # used last by the second forward pass, gone before the third; back once the third backward pass has freed 10
    assert (transfer.after, transfer.gone, transfer.back, transfer.needed) == (1, 2, 5, 5)
    assert found.makespan == 6 + 2 + 2  # two seconds each way, nothing to do meanwhile
    assert offload(chain, [Operation(op.action, op.stage) for op in found.operations], 12, 5.0) is None


def test_what_cannot_be_is_refused():
    chain = Chain(forward=[1] * 4, backward=[2] * 4, output_size=[1] * 4, saved_size=[9] * 4)
    for bandwidth in (-1.0, float("nan")):
        with pytest.raises(ConfigError, match="bandwidth is a number from 0"):
            pofo(chain, 20, bandwidth)
    with pytest.raises(ConfigError, match="with offloading too"):
        pofo(chain, 5, 1.0)
    with pytest.raises(ConfigError, match="at least 12 is needed"):
        pofo(chain, 5, 0.0)


@pytest.mark.parametrize("trial", range(4))
def test_no_choice_of_items_and_transfers_is_much_faster(trial):
    """Every way to save stages or to compute segments again, with every memory for these and every set of tensors that may leave,
    timed exactly."""
    rng = random.Random(random.randrange(10**9))
    stages = rng.randint(2, 4)
    chain = Chain(**{**_random_costs(rng, stages), "forward_temp": (), "backward_temp": ()})
    peak = save_everything(chain).peak
    budget, bandwidth = float(int(rng.uniform(0.5, 0.9) * peak)), rng.choice([0.5, 2.0])
    table = RotorTable(chain, int(budget))

    def items(first):
        if first == stages:
            yield ()
            return
        for past in range(first + 1, stages + 1):
            for rest in items(past):
                memories = {table.time(first, past - 1, m): m for m in range(int(budget), -1, -1)}
                for seconds, memory in memories.items():
                    if seconds < float("inf"):
                        yield ((first, past, memory), *rest)
        for rest in items(first + 1):
            yield ((first, first + 1, -1), *rest)

    best = float("inf")
    program = _Program(chain, int(budget), bandwidth)
    for sequence in items(0):
        state = State(0.0, 0.0, 0.0, 0.0, tuple((*item, False) for item in sequence))
        operations = program.operations(state)
        names = [("saved" if memory < 0 else "x", first) for first, _, memory in sequence]
        for count in range(len(names) + 1):
            for only in combinations(names, count):
                fitted = offload(chain, operations, budget, bandwidth, set(only))
                best = min(best, float("inf") if fitted is None else fitted.makespan)
    try:
        found = pofo(chain, budget, bandwidth).makespan
    except ConfigError:
        assert best == float("inf")
        return
    assert found <= 1.1 * best


def test_a_long_chain_keeps_a_sixth_for_less_than_a_sixth_of_the_time():
    """Published: activations 4 to 6 times smaller at under 20%; a link that carries half of what forward passes produce."""
    chain = Chain(forward=[1] * 20, backward=[2] * 20, output_size=[1] * 20, saved_size=[16] * 20)
    full = save_everything(chain)
    found = pofo(chain, full.peak / 5, 8.0)
    assert found.makespan < 1.19 * full.makespan and found.peak <= full.peak / 5
