"""Rematerialisation of chains: published values, brute force over all schedules, memory counted, √n segments."""

from __future__ import annotations

import heapq
import random
from itertools import count

import numpy as np
import pytest

from luban.core.errors import ConfigError
from luban.core.units import bytes_
from luban.planner.remat.chain import Chain, Operation, save_everything, simulate
from luban.planner.remat.rotor import rotor
from luban.planner.remat.schedules import Solved, schedule_of
from luban.planner.remat.sqrt_segments import sqrt_segments


def _random_chain(rng, stages, temps=True):
    """Integer costs; what is saved contains the output."""
    outputs = [rng.randint(1, 5) for _ in range(stages)]
    return {
        "forward": [rng.randint(1, 6) for _ in range(stages)],
        "backward": [rng.randint(1, 9) for _ in range(stages)],
        "output_size": outputs,
        "saved_size": [x + rng.randint(0, 6) for x in outputs],
        "input_size": rng.randint(0, 5),
        "forward_temp": [rng.randint(0, 4) for _ in range(stages)] if temps else (),
        "backward_temp": [rng.randint(0, 4) for _ in range(stages)] if temps else (),
    }


def _brute_force(chain, budget):
    """Least seconds of any memory-persistent schedule, by Dijkstra's algorithm over the sets of tensors in memory.

    A state is (activations that are kept, stages whose tensors are saved, the activation that moves forward, the gradient).
    What is kept or saved stays until its backward pass; only the moving activation may be replaced by its successor.
    """
    stages, order = len(chain), count()
    start = (frozenset([0]), frozenset(), None, None)
    queue, done = [(0, next(order), start)], set()

    def used(state):
        kept, saved, moving, gradient = state
        free = 0 if moving is None else chain.x(moving)
        return (
            sum(map(chain.x, kept))
            + sum(map(chain.saved, saved))
            + free
            + (0 if gradient is None else chain.x(gradient))
        )

    while queue:
        time, _, state = heapq.heappop(queue)
        if state in done:
            continue
        done.add(state)
        kept, saved, moving, gradient = state
        if gradient == 0:
            return time
        here = used(state)
        ready = {*kept, *(i + 1 for i in saved), *([] if moving is None else [moving])}
        moves = []
        for i in ready:
            if gradient is None and i == stages:
                moves.append((0, here, (kept - {i}, saved, None, i)))  # loss
            if i >= (stages if gradient is None else gradient):
                continue
            f, temp = chain.forward[i], chain.temps(i)[0]
            others = None if moving == i else moving
            if others is None and i + 1 not in kept:
                if moving == i:  # replaced, or kept from now on
                    moves.append((f, here + chain.x(i + 1) + temp, (kept, saved, i + 1, gradient)))
                if i in kept or i - 1 in saved:
                    moves.append((f, here + chain.x(i + 1) + temp, (kept, saved, i + 1, gradient)))
                if moving == i:
                    moves.append((f, here + chain.x(i + 1) + temp, (kept | {i}, saved, i + 1, gradient)))
            if others is None and i not in saved:
                stays = kept | {i} if moving == i else kept
                moves.append((f, here + chain.saved(i) + temp, (stays, saved | {i}, None, gradient)))
        i = None if gradient is None else gradient - 1
        if i is not None and i in saved and moving is None:
            after = (kept - {i}, saved - {i}, None, i)
            moves.append((chain.backward[i], here + chain.temps(i)[1], after))
        for seconds, peak, after in moves:
            if max(peak, used(after)) <= budget and after not in done:
                heapq.heappush(queue, (time + seconds, next(order), after))
    return None


def _homogeneous(stages):
    return {"forward": [1] * stages, "backward": [2] * stages, "output_size": [1] * stages, "saved_size": [2] * stages}


@pytest.mark.parametrize(("budget", "seconds"), [(5, 52), (7, 33), (10, 29), (18, 24), (100, 24)])
def test_values_of_a_homogeneous_chain(budget, seconds):
    found = rotor(**_homogeneous(8), budget=budget)
    assert found.makespan == seconds and found.peak <= budget
    from luban.parallel.remat import rotor as public

    assert public is rotor


def test_too_small_a_budget_names_the_least():
    with pytest.raises(ConfigError, match="budget of 4 is too small for this chain: at least 5 is needed"):
        rotor(**_homogeneous(8), budget=4)


def test_arrays_are_numbers_too_and_whole_ones_stay_exact():
    chain = _homogeneous(8)
    for dtype in (np.int64, np.float64):
        assert rotor(**{name: np.array(values, dtype) for name, values in chain.items()}, budget=7).makespan == 33
    assert rotor(**chain, budget=np.float32(7)).makespan == 33


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"budget": float("nan")}, "a budget is a number"),
        ({"budget": "10"}, "a budget is a number"),
        ({"forward": ["a"] * 8}, "forward is a sequence of numbers"),
        ({"saved_size": 4}, "saved_size is a sequence of numbers"),
        ({"backward": [None] * 8}, "backward is a sequence of numbers"),
        ({"input_size": "x"}, "input_size"),
        ({"output_size": np.ones((8, 2))}, "output_size is a sequence of numbers"),
    ],
)
def test_what_is_no_number_is_refused_by_name(changed, said):
    with pytest.raises(ConfigError, match=said):
        rotor(**{**_homogeneous(8), "budget": 10, **changed})


@pytest.mark.parametrize("seed", range(12))
def test_rotor_is_the_best_of_all_schedules(seed):
    rng = random.Random(seed)
    for stages in (1, 2, 3, 4, 5):
        costs = _random_chain(rng, stages, temps=seed % 2 == 0)
        chain = Chain(**costs)
        least = int(min(sqrt_segments(chain, k).peak for k in range(1, stages + 1)))
        for budget in {rng.randint(1, int(save_everything(chain).peak)) for _ in range(4)} | {least}:
            best = _brute_force(chain, budget)
            if best is None:
                with pytest.raises(ConfigError, match="at least"):
                    rotor(**costs, budget=budget)
            else:
                found = rotor(**costs, budget=budget)
                assert found.makespan == best and found.peak <= budget, (costs, budget)


def test_slots_never_exceed_the_budget_and_cost_little():
    """Sizes that no unit divides are rounded up to a 500th of the budget."""
    rng = random.Random(21)
    for stages in (6, 12, 20):
        costs = _random_chain(rng, stages)
        names = ("output_size", "saved_size", "forward_temp", "backward_temp")
        scaled = {name: [size * 1234.567 for size in costs[name]] for name in names}
        scaled = {**costs, **scaled, "input_size": costs["input_size"] * 1234.567}
        full = save_everything(Chain(**costs)).peak
        for budget in (full, int(0.8 * full), int(0.6 * full)):
            found = rotor(**scaled, budget=budget * 1234.567 * (1 + 1e-12))
            # of each stage at most its saved tensors and its input are held: 2L sizes, each at most a slot too large
            less = rotor(**costs, budget=int(budget * (1 - (2 * stages + 2) / 500)))
            assert found.peak <= budget * 1234.568
            assert rotor(**costs, budget=budget).makespan <= found.makespan <= less.makespan


def test_the_least_budget_that_is_named_is_enough():
    """Also where rounding to slots would refuse it."""
    rng = random.Random(22)
    for _ in range(5):
        costs = _random_chain(rng, 10)
        costs["saved_size"] = [s * 1.0001 + 0.001 for s in costs["saved_size"]]
        with pytest.raises(ConfigError) as refused:
            rotor(**costs, budget=1)
        least = float(str(refused.value).split("at least ")[1].split()[0])
        assert rotor(**costs, budget=least * (1 + 1e-5)).peak <= least * (1 + 1e-5)
        with pytest.raises(ConfigError):
            rotor(**costs, budget=least * (1 - 1e-4))


def test_more_memory_never_costs_time():
    costs = _random_chain(random.Random(23), 14)
    top = int(save_everything(Chain(**costs)).peak)
    times = []
    for budget in range(1, top + 1):
        try:
            times.append(rotor(**costs, budget=budget).makespan)
        except ConfigError:
            assert not times
    assert times == sorted(times, reverse=True) and times[-1] == sum(costs["forward"]) + sum(costs["backward"])


def test_sqrt_segments():
    """Peak memory grows as c·√n, and each stage but those of the last segment is computed twice."""
    sizes, peaks = [n * n for n in range(3, 21)], []
    for stages in sizes:
        found = sqrt_segments(Chain(**_homogeneous(stages)))
        peaks.append(found.peak)
        assert found.forwards == 2 * stages - round(stages**0.5)
        assert found.makespan == 3 * stages + stages - round(stages**0.5)
    root = np.sqrt(sizes)
    c = (root @ peaks) / (root @ root)
    assert 1 - np.sum((peaks - c * root) ** 2) / np.sum((peaks - np.mean(peaks)) ** 2) > 0.98
    one = sqrt_segments(Chain(**_homogeneous(9)), 1)
    assert one.makespan == 27 and one.peak == save_everything(Chain(**_homogeneous(9))).peak


def test_rotor_is_no_slower_than_sqrt_segments_in_their_memory():
    rng = random.Random(24)
    for stages in (4, 9, 25):
        costs = _random_chain(rng, stages)
        simple = sqrt_segments(Chain(**costs))
        assert rotor(**costs, budget=simple.peak).makespan <= simple.makespan


def test_the_simulator_counts_by_hand():
    sizes = {"output_size": [10, 20], "saved_size": [15, 26], "input_size": 7}
    chain = Chain(forward=[1, 2], backward=[3, 4], **sizes, forward_temp=[1, 2], backward_temp=[100, 0])
    found = save_everything(chain)
    assert found.makespan == 10
    assert found.peak == 7 + 15 + 10 + 100  # the first stage's backward pass
    for wrong, message in (
        ([Operation("backward", 0)], "lacks saved 0, gradient 1"),
        ([Operation("forward", 0), Operation("forward_save", 0)], "lacks x 0"),
        ([Operation("forward", 0)], "ends with"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate(chain, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"forward": []}, "at least one stage"),
        ({"backward": [1]}, "backward has 1 values for 8 stages"),
        ({"forward_temp": [1]}, "forward_temp has 1 values"),
        ({"saved_size": [1, -2, 1, 1, 1, 1, 1, 1]}, r"saved_size\[1\] is a number from 0, not -2"),
        ({"input_size": float("nan")}, "input_size"),
    ],
)
def test_bad_chains_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        rotor(**{**_homogeneous(8), **change}, budget=10)
    with pytest.raises(ConfigError, match="1 to 8 segments"):
        sqrt_segments(Chain(**_homogeneous(8)), 9)


def test_a_summary_counts_what_is_repeated():
    chain = Chain(forward=[1] * 8, backward=[2] * 8, output_size=[1e6] * 8, saved_size=[2e6] * 8)
    everything = save_everything(chain)
    whole = bytes_(everything.peak)
    kept = Solved.of("rotor", "7MB", chain, everything.operations, everything.peak)
    assert str(kept) == f"{whole} of the {whole} that saving everything takes, 0 forward passes of 8 layers repeated"
    found = schedule_of("rotor", chain, "7MB")
    again = round((found.makespan - everything.makespan) / 1)  # a forward pass takes one second
    assert again > 1
    solved = Solved.of("pofo", "7MB", chain, found.operations, found.peak, 1)
    assert (solved.repeated, solved.layers, solved.peak_bytes, solved.budget) == (again, 8, found.peak, "7MB")
    assert str(solved).startswith(f"{bytes_(found.peak)} of the {whole}")
    assert str(solved).endswith(f"{again} forward passes of 8 layers repeated, 1 tensor sent to the host and back")
