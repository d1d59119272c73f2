"""A plan changes nothing but rounding: losses, gradient norms, weights and optimizer state of one process, in float64.

Every plan trains every drawn family for some steps with clipping and micro-batches over Gloo, stops half-way, and goes on
from the state that another plan left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from drawn import SEED as DRAW
from spread import NAMES, PROCESSES, ROWS, ZOO, engine, join, joined, through_disk, train

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.data.batch import Batch
from luban.optim.muon import Muon
from luban.optim.schedule_free import ScheduleFree
from luban.parallel import apply as parallel_apply
from luban.parallel.engine import HeldOut
from luban.parallel.plan_checks import check_plan
from luban.parallel.tensor import OverlappedTokens
from luban.parallel.world import World

FEW_FAMILIES = 4  # in every test run
STEPS, MORE_STEPS, MANY_STEPS = 2, 6, 20  # of a drawn sample in every test run, of all plans, of a drawn sample
PLANS = [
    {"replicate": 4},
    {"shard": 4},
    {"shard": 4, "zero": 2},
    {"shard": 4, "zero": 1},
    {"replicate": 2, "shard": 2},
    {"replicate": 2, "shard": 2, "zero": 1, "remat": "full"},
    {"tensor": 4},
    {"replicate": 2, "tensor": 2, "remat": "selective"},
    {"replicate": 2, "tensor": 2, "remat": "sqrt"},
    {"shard": 4, "remat": "sqrt"},
    {"shard": 2, "zero": 1, "context": 2, "remat": "sqrt"},
    {"pipeline": 2, "shard": 2, "microbatches": 2, "remat": "sqrt"},
    {"shard": 2, "tensor": 2},
    {"shard": 2, "zero": 1, "tensor": 2, "remat": "full"},
    {"pipeline": 4, "microbatches": 4},
    {"pipeline": 2, "replicate": 2, "microbatches": 2, "schedule": "gpipe"},
    {"pipeline": 2, "replicate": 2, "microbatches": 2, "schedule": "interleaved"},
    {"pipeline": 2, "shard": 2, "microbatches": 2},
    {"pipeline": 2, "shard": 2, "zero": 1, "microbatches": 1, "remat": "full"},
    {"pipeline": 2, "tensor": 2, "microbatches": 4, "schedule": "zero_bubble"},
    {"pipeline": 2, "tensor": 2, "microbatches": 2, "schedule": "interleaved", "remat": "full"},
    {"pipeline": 2, "context": 2, "microbatches": 4},
    {"context": 4},
    {"context": 2, "replicate": 2, "remat": "full"},
    {"context": 2, "shard": 2, "zero": 2},
    {"context": 2, "tensor": 2},
    {"shard": 4, "expert": 4},
    {"shard": 4, "zero": 1, "expert": 2},
    {"replicate": 2, "tensor": 2, "expert": 2, "remat": "full"},
    {"shard": 2, "tensor": 2, "expert": 4},
    {"shard": 2, "tensor": 2, "zero": 2, "expert": 2},
    {"context": 4, "expert": 2},
    {"context": 2, "shard": 2, "expert": 4, "remat": "full"},
    {"pipeline": 2, "shard": 2, "expert": 2, "microbatches": 2},
    {"pipeline": 2, "tensor": 2, "expert": 2, "microbatches": 4, "schedule": "zero_bubble"},
]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-3))


def refusal(name: str, plan: ParallelPlan) -> str | None:
    """Why the plan can't spread this family; None if it can."""
    try:
        plan.check_tokens(ZOO[name].batch(1, np.random.default_rng(0)).tokens.shape[1])
        check_plan(plan, ZOO[name].spec)
    except ConfigError as error:
        return str(error)
    return None


def plans_of(name: str) -> list[dict]:
    return [plan for plan in PLANS if refusal(name, ParallelPlan(**plan)) is None]


class Reference(NamedTuple):
    """What one process computes."""

    curve: list[tuple[float, float]]
    state: dict[str, dict[str, torch.Tensor]]
    heldout: HeldOut
    uneven: HeldOut  # of a number of rows that nothing divides


def heldout(name: str, rows: int) -> Batch:
    return ZOO[name].batch(rows, np.random.default_rng(99))


def reference(name: str, steps: int) -> Reference:
    single = engine(name, ParallelPlan(), World())
    curve = train(single, name, 0, steps)
    sums = [single.evaluate(heldout(name, rows)) for rows in (ROWS, ROWS - 1)]
    return Reference(curve, single.state_dict(), *sums)


def references(names: list[str], rank: int, steps: int) -> dict[str, Reference]:
    """Each process computes some of them."""
    mine = {name: reference(name, steps) for name in names[rank::PROCESSES]}
    found: list[dict[str, Reference]] = [{}] * PROCESSES
    dist.all_gather_object(found, mine)
    return {name: one for part in found for name, one in part.items()}


def compare(right: Reference, steps: int, name: str, plan: dict, other: dict) -> dict[str, float]:
    """How far training under `plan`, and then `other`, is from one process."""
    plans = [ParallelPlan(**fields) for fields in (plan, other)]
    engines = [engine(name, p, World() if p == ParallelPlan() else joined(p)) for p in plans]
    found = train(engines[0], name, 0, steps // 2)
    through_disk(*engines, name)
    found += train(engines[1], name, steps // 2, steps)
    state = engines[1].state_dict()
    errors = {"curve": float(np.abs(np.array(found) / np.array(right.curve) - 1).max())}
    for what, rows in (("heldout", ROWS), ("uneven", ROWS - 1)):
        measured, wanted = engines[1].evaluate(heldout(name, rows)), getattr(right, what)
        errors[what] = abs(measured.loss / wanted.loss - 1) + (measured.targets != wanted.targets)
        assert measured.metrics.keys() == wanted.metrics.keys()
        for metric, counted in wanted.metrics.items():
            assert measured.metrics[metric] == pytest.approx(counted, rel=1e-4), metric
    for part in ("model", "optimizer"):
        assert state[part].keys() == right.state[part].keys()
        errors[part] = max(relative(state[part][key], value) for key, value in right.state[part].items())
    held = sum(p.numel() for p in engines[0].params.parameters.values())
    errors["share"] = held / sum(tensor.numel() for tensor in right.state["model"].values())
    return errors


def draw(families: int) -> list[tuple[str, dict, dict]]:
    """So many families, each under two plans one after the other (of all families together, with few exceptions, every plan is
    drawn); and two that change between one process and several."""
    generator = np.random.default_rng(list(DRAW.encode()))
    options = {name: plans_of(name) for name in generator.permutation(NAMES)[:families].tolist()}
    left, cases = generator.permutation(len(PLANS)).tolist(), []
    for name in sorted(options, key=lambda name: len(options[name])):  # those with few options choose first
        chosen = [PLANS[i] for i in left if PLANS[i] in options[name]][:2]
        while len(chosen) < 2:
            chosen.append(options[name][generator.integers(len(options[name]))])
        left = [i for i in left if PLANS[i] not in chosen]
        cases.append((name, *chosen))
    first, second = generator.choice(sorted(options), 2, replace=False).tolist()
    one: dict = {}
    cases.append((first, one, options[first][generator.integers(len(options[first]))]))
    cases.append((second, options[second][generator.integers(len(options[second]))], one))
    return cases


MUON = {"optimizer": Muon(lr=1e-2, adamw_lr=1e-2, eps=1e-4)}
FP16 = {"precision": "fp16", "clip": 0.0}
DIVIDED = [  # family, plan, settings, how near to one process
    ("decoder", {"shard": 4}, MUON, 1e-9),
    ("uneven", {"shard": 2, "tensor": 2}, MUON, 1e-9),
    ("decoder", {"tensor": 4}, MUON, 1e-9),
    ("uneven", {"shard": 2, "tensor": 2}, {"optimizer": ScheduleFree(lr=1e-2, eps=1e-4)}, 1e-9),
    ("uneven", {"shard": 4, "remat": "rotor", "remat_budget": "75%"}, {}, 1e-9),
    ("uneven", {"shard": 2, "tensor": 2, "remat": "pofo", "remat_budget": "75%"}, {}, 1e-9),
    ("uneven", {"tensor": 2, "pipeline": 2, "remat": "rotor", "remat_budget": "90%"}, {}, 1e-9),
    ("uneven", {"tensor": 2, "pipeline": 2, "microbatches": 2, "stage_layers": (1, 4)}, {}, 1e-9),
    ("uneven", {"pipeline": 4, "microbatches": 2, "stage_layers": (1, 1, 1, 2), "schedule": "gpipe"}, {}, 1e-9),
    ("uneven", {"shard": 2, "tensor": 2}, {"overlapped": True}, 1e-9),
    ("late-mixture", {"pipeline": 2, "tensor": 2, "microbatches": 2}, {"overlapped": True}, 1e-9),
    ("decoder", {"tensor": 4}, {"overlapped": True}, 1e-9),
    ("decoder", {"shard": 4}, FP16, 3e-3),  # fp16 has 11 bits
    ("decoder", {"shard": 2, "replicate": 2, "zero": 1}, FP16, 3e-3),
    ("late-mixture", {"pipeline": 2, "shard": 2, "microbatches": 2}, {}, 1e-9),
    ("late-mixture", {"pipeline": 2, "shard": 2, "expert": 2, "microbatches": 2}, {}, 1e-9),
    ("late-mixture", {"pipeline": 2, "tensor": 2, "expert": 2, "microbatches": 2}, {}, 1e-9),
]


def other_settings(name: str, fields: dict, settings: dict, _: float) -> float:
    """How far losses and gradient norms under a plan are from those of one process; `overlapped`: with the hooks that compiled
    layers have."""
    plan, usual = ParallelPlan(**fields), parallel_apply.SlicedTokens
    settings = dict(settings)
    if settings.pop("overlapped", False):
        parallel_apply.SlicedTokens = OverlappedTokens
    found = train(engine(name, plan, joined(plan), **settings), name, 0, 3)
    parallel_apply.SlicedTokens = usual
    right = train(engine(name, ParallelPlan(), World(), **settings), name, 0, 3)
    return float(np.abs(np.array(found) / np.array(right) - 1).max())


def saved_after_validation(zero: int) -> bool:
    """Whether what is saved after held-out batches are the fp32 shards that were there before."""
    plan = ParallelPlan(shard=PROCESSES, zero=zero)
    trained = engine("decoder", plan, joined(plan), precision="bf16")
    train(trained, "decoder", 0, 1)
    before = {n: [(p.clone(), b) for p, b in r.pieces] for n, r in trained.held()["model"].items()}
    trained.evaluate(heldout("decoder", ROWS))
    after = trained.held()["model"]
    return all(
        b == other and p.dtype == q.dtype == torch.float32 and torch.equal(p, q)
        for name, pieces in before.items()
        for (p, b), (q, other) in zip(pieces, after[name].pieces, strict=True)
    )


def worker(rank: int, folder: str, cases: list[tuple[str, dict, dict]], steps: int, divided: list) -> None:
    join(rank, folder)
    right = references(sorted({name for name, _, _ in cases}), rank, steps)
    found = [compare(right[case[0]], steps, *case) for case in cases]
    others = [other_settings(*case) for case in divided]
    validated = [saved_after_validation(zero) for zero in (1, 2, 3)]
    agreed = joined(ParallelPlan(shard=PROCESSES)).agree({"rank": rank}) == {"rank": 0}
    stopped = engine("decoder", ParallelPlan(replicate=PROCESSES), joined(ParallelPlan(replicate=PROCESSES)))
    batch = ZOO["decoder"].batch(ROWS, np.random.default_rng(0))
    stops = [stopped.synchronize(stopped.submit(batch, stop=stop)).stop for stop in (False, rank == 2)]
    Path(folder, f"{rank}.json").write_text(
        json.dumps({"found": found, "agreed": agreed, "stops": stops, "others": others, "validated": validated})
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Iterator[tuple[list, list[dict]]]:
    cases = draw(FEW_FAMILIES)
    yield cases, run(tmp_path_factory.mktemp("plans"), cases, STEPS, DIVIDED)


def check(cases: list, results: list[dict]) -> None:
    for rank, result in enumerate(results):
        for case, errors in zip(cases, result["found"], strict=True):
            errors = dict(errors)
            divided = min(case[1].get("shard", 1), case[1].get("expert", 4))
            assert errors.pop("share") <= 1.2 / divided + 0.05, (rank, case)
            worst = max(errors, key=errors.get)
            assert errors[worst] < 1e-9, (rank, case, worst, errors[worst])


def test_plans_equal_one_process(drawn):
    check(*drawn)


def test_processes_agree_and_one_can_ask_for_the_end(drawn):
    for result in drawn[1]:
        assert result["agreed"] and result["stops"] == [False, True]


def test_muon_and_fp16_equal_one_process_where_their_weights_are_divided(drawn):
    for result in drawn[1]:
        for (name, plan, settings, bound), error in zip(DIVIDED, result["others"], strict=True):
            assert error < bound, (name, plan, settings, error)


def test_validation_changes_nothing_that_is_saved(drawn):
    for result in drawn[1]:
        assert result["validated"] == [True] * 3


def run(folder: Path, cases: list, steps: int, divided: Sequence = ()) -> list[dict]:
    warm.processes(worker, PROCESSES, str(folder), cases, steps, [*divided])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.slow
def test_many_steps_equal_those_of_one_process(tmp_path):
    cases = draw(len(NAMES))
    check(cases, run(tmp_path, cases, MANY_STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_plan_of_a_family_equals_one_process(tmp_path, name):
    """Each family in processes of its own, which keep the groups of all plans that they have met: some 20 threads a plan."""
    plans = plans_of(name)
    cases = [(name, plan, other) for plan, other in zip(plans, plans[1:] + plans[:1], strict=True)]
    check(cases, run(tmp_path, cases, MORE_STEPS))
