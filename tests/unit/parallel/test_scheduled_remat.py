"""Schedules of rematerialisation, executed: what is computed stays, and what is held is counted against the budget."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from drawn import drawn
from families import FAMILIES, engine_of
from torch import nn

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.data.batch import Batch
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.parallel.device import compiler_missing
from luban.parallel.remat.executor import ScheduledRun
from luban.parallel.remat.host import SMALLEST, Streams, Transfers
from luban.parallel.remat.scheduled import measured_chain, schedule_figures
from luban.planner.remat.chain import Chain, save_everything
from luban.planner.remat.pofo import offload, pofo
from luban.planner.remat.rotor import least_memory, rotor
from luban.planner.remat.schedules import Solved, schedule_of
from luban.planner.remat.sqrt_segments import sqrt_segments
from luban.train.recipe import Recipe, TrainConfig
from luban.train.trace_memory import trace_memory


def packed_row(tokens: int) -> Batch:
    """A row of one document."""
    at = np.arange(tokens, dtype=np.int32)[None]
    return Batch(
        tokens=at.astype(np.int64) % 64,
        targets=at.astype(np.int64) % 64,
        loss_mask=np.ones((1, tokens), dtype=bool),
        documents=np.zeros((1, tokens), dtype=np.int32),
        positions=at,
    )


def drawn_stages(draw: random.Random, dropout: float = 0.3) -> list[nn.Module]:
    """Stages of different widths and depths, in fp64."""
    width, stages = draw.choice([8, 12]), []
    for _ in range(draw.randint(3, 9)):
        after, inner = draw.choice([8, 12]), draw.choice([8, 40])
        stages.append(nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, after)))
        width = after
    return [stage.double() for stage in stages]


def weights(stages) -> set[int]:
    return {p.untyped_storage()._cdata for stage in stages for p in stage.parameters()}


def held_bytes(run: ScheduledRun, outside: set[int]) -> int:
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in run.tensors()}
    return sum(size for key, size in found.items() if key not in outside)


def counted(seen: list[int], outside: set[int], run: ScheduledRun) -> None:
    seen.append(held_bytes(run, outside))


def gradients(stages, x, seed, operations=None, watch=None, run=None):
    """(output, gradients of the input and of all weights)."""
    for stage in stages:
        stage.zero_grad()
    torch.manual_seed(seed)
    x = x.detach().clone().requires_grad_()
    if run is not None:
        y = run(x)
    elif operations is None:
        y = nn.Sequential(*stages)(x)
    else:
        y = ScheduledRun(stages, operations, random=True, watch=watch).forward(x)
    y.square().sum().backward()
    return y.detach(), [x.grad, *(p.grad for stage in stages for p in stage.parameters())]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_any_schedule_gives_the_same_gradients_with_dropout_within_its_budget(share):
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    stages = drawn_stages(draw)
    x = torch.randn(16, stages[0][0].in_features, dtype=torch.float64)
    outside = weights(stages)
    chain = measured_chain(stages, x.requires_grad_(), outside)
    least = least_memory(chain)
    budget = least + share * (save_everything(chain).peak - least)
    schedule = rotor(
        chain.forward, chain.backward, chain.output_size, chain.saved_size, budget, input_size=chain.input_size
    )
    assert schedule.peak <= budget
    seen = []
    plain = gradients(stages, x, seed)
    lean = gradients(stages, x, seed, schedule.operations, partial(counted, seen, outside))
    assert torch.equal(plain[0], lean[0])
    for ours, theirs in zip(lean[1], plain[1], strict=True):
        assert torch.equal(ours, theirs)
    assert max(seen) <= budget


def test_what_square_root_segments_keep_grows_with_the_square_root_of_the_depth():
    """c·√n with R² > 0.98, counted while the schedule runs."""
    import numpy as np

    peaks, depths = [], [9, 16, 25, 36, 64]
    for depth in depths:
        stages = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double() for _ in range(depth)]
        x = torch.randn(8, 4, dtype=torch.float64)
        outside = weights(stages)
        chain = measured_chain(stages, x, outside, seconds=[1.0] * depth)
        seen = []
        schedule = sqrt_segments(chain)
        gradients(stages, x, 0, schedule.operations, partial(counted, seen, outside))
        assert max(seen) <= schedule.peak
        assert schedule.forwards < 2 * depth  # at most one more forward pass
        peaks.append(max(seen))
    roots, peaks = np.sqrt(depths), np.array(peaks)
    c = (roots @ peaks) / (roots @ roots)
    assert 1 - ((peaks - c * roots) ** 2).sum() / ((peaks - peaks.mean()) ** 2).sum() > 0.98


@pytest.mark.parametrize("text", ["{}B", "{}%"])
def test_a_budget_below_the_least_is_refused_with_the_least(text):
    chain = Chain(forward=[1] * 9, backward=[2] * 9, output_size=[1e6] * 9, saved_size=[4e6] * 9)
    with pytest.raises(ConfigError, match=r"plan.remat_budget .* use 7MB, or 18.5% of the 38 MB"):
        schedule_of("rotor", chain, text.format(1))
    for enough in ("7MB", "18.5%"):
        assert schedule_of("rotor", chain, enough).peak <= 7.03e6


def test_a_stage_that_does_not_compute_the_same_again_is_named():
    from luban.core.errors import TrainingError

    class Counting(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x.sin() if self.calls > 1 else x.sin().sin()

    stages = [Counting(), nn.Linear(3, 3)]
    chain = measured_chain([nn.Linear(3, 3), nn.Linear(3, 3)], torch.randn(2, 3), seconds=[1, 1])
    y = ScheduledRun(stages, sqrt_segments(chain, 2).operations).forward(torch.randn(2, 3).requires_grad_())
    with pytest.raises(TrainingError, match="layer 0 saved"):
        y.sum().backward()


def test_a_run_that_is_never_run_backward_leaves_nothing():
    import gc
    import weakref

    stages = [nn.Linear(3, 3), nn.Linear(3, 3)]
    gc.disable()
    try:
        x = torch.randn(2, 3)
        run = ScheduledRun(stages, sqrt_segments(measured_chain(stages, x, seconds=[1, 1]), 1).operations)
        y = run.forward(x.requires_grad_())
        gone = weakref.ref(run)
        del run, y
        assert gone() is None
    finally:
        gc.enable()


STACKED = [name for name, family in FAMILIES.items() if family.spec.layers]


@pytest.mark.parametrize(("name", "remat"), drawn(product(STACKED, ["sqrt", "rotor", "pofo"]), 6))
def test_every_family_trains_the_same_under_a_schedule(name, remat):
    """Encoder states, position biases and router losses, whose gradients leave the layers sideways, included."""
    seed = random.randrange(10**6)
    family = FAMILIES[name]
    if family.spec.body.stacked and name == "decoder":
        family = replace(family, spec=replace(family.spec, layers=family.spec.layers[:1] * 7))
    found = []
    for plan in (ParallelPlan(), ParallelPlan(remat=remat, remat_budget="60%")):
        try:
            engine = engine_of(family, seed=seed, plan=plan, precision="fp64", accumulate=2)
            batches = [family.batch(8, np.random.default_rng([seed, step])) for step in range(2)]
            results = [engine.step(batch) for batch in batches]
        except ConfigError as error:  # two layers may need more than that
            assert "plan.remat_budget" in str(error)
            least = str(error).split("or ")[1].split(" ")[0]
            engine = engine_of(
                family, seed=seed, plan=replace(plan, remat_budget=least), precision="fp64", accumulate=2
            )
            results = [engine.step(batch) for batch in batches]
        found.append([(r.loss, r.grad_norm, r.metrics) for r in results])
    assert found[0] == found[1]


@pytest.mark.slow  # half a minute of compiling
def test_compiled_layers_run_by_a_schedule():
    """Bit by bit as without one, since a layer runs the same code each time; on a CPU as on a GPU layers are compiled one by one."""
    if compiler_missing(torch.device("cpu")):
        pytest.skip("needs a C++ compiler")
    family = FAMILIES["decoder"]
    family = replace(family, spec=replace(family.spec, layers=family.spec.layers[:1] * 5))
    found = []
    for remat, compiled, layer in (
        ("none", False, "none"),
        ("rotor", True, "none"),
        ("pofo", True, "none"),
        ("rotor", True, "selective"),
    ):
        plan = ParallelPlan(remat=remat, remat_budget="55%", remat_layer=layer)
        engine = engine_of(family, seed=3, plan=plan, compile=compiled)
        results = [engine.step(family.batch(8, np.random.default_rng(step))) for step in range(2)]
        found.append([x for r in results for x in (r.loss, r.grad_norm)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[2] == pytest.approx(found[1], rel=1e-9)
    assert found[3] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("remat", ["sqrt", "rotor", "pofo"])
def test_a_run_says_once_what_its_schedule_keeps_and_has_it_as_figures(remat, capsys):
    family = FAMILIES["decoder"]
    family = replace(family, spec=replace(family.spec, layers=family.spec.layers[:1] * 6))
    engine = engine_of(family, seed=3, plan=ParallelPlan(remat=remat, remat_budget="70%"))
    assert schedule_figures(engine.module) == {}
    for step in range(2):
        engine.step(family.batch(8, np.random.default_rng(step)))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"plan.remat {remat}: ")]
    assert len(said) == 1 and "that saving everything takes" in said[0] and "of 6 layers repeated" in said[0]
    (figures,) = schedule_figures(engine.module)["schedules"]
    assert said == [f"plan.remat {remat}: {Solved(**figures)}"]
    assert (figures["remat"], figures["budget"], figures["layers"]) == (remat, "" if remat == "sqrt" else "70%", 6)
    assert 0 < figures["peak_bytes"] < figures["everything_bytes"]
    if remat == "rotor":
        assert figures["peak_bytes"] <= 0.7 * figures["everything_bytes"] and figures["repeated"] > 0


@pytest.mark.slow  # seconds of compiling
def test_layers_compiled_before_are_measured():
    """A backward pass that was compiled to overwrite what was saved runs once a graph."""
    if compiler_missing(torch.device("cpu")):
        pytest.skip("needs a C++ compiler")

    class Perceptron(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x):
            return x + self.down(nn.functional.silu(self.up(x)))

    layer = Perceptron()
    layer.compile(dynamic=False, fullgraph=True)
    x = torch.randn(8, 32, requires_grad=True)
    layer(x).sum().backward()  # compiled here, for one pass
    chain = measured_chain([layer, layer], x)
    assert list(chain.output_size) == [8 * 32 * 4] * 2
    assert all(size >= 8 * 32 * 4 + 8 * 48 * 4 for size in chain.saved_size)


def test_what_layers_keep_under_a_schedule_needs_a_schedule_and_compiled_layers():
    with pytest.raises(ConfigError, match=r"use --plan\.remat rotor, or --plan\.remat selective alone"):
        ParallelPlan(remat="full", remat_layer="selective")
    plan = ParallelPlan(remat="rotor", remat_layer="selective")
    with pytest.raises(ConfigError, match=r"use --train\.compile true"):
        engine_of(FAMILIES["decoder"], seed=0, plan=plan)


def test_memory_of_a_model_under_rotor_stays_within_its_budget_and_the_prediction():
    """All bytes alive in a forward and backward pass, beside those without a schedule."""
    spec = uniform(vocab_size=64, width=32, layers=8, feedforward=SwiGLU(width=96))
    recipe = Recipe(train=TrainConfig(batch_size=16, seq_len=64))
    row = packed_row(64)
    plain = trace_memory(recipe, spec, row)
    budget = 0.3 * plain.saved
    lean = trace_memory(replace(recipe, plan=ParallelPlan(remat="rotor", remat_budget=f"{budget}B")), spec, row)
    outside = 16 * 64 * (64 * 4 + 32 * 4 * 3)  # logits, and hidden states outside of the layers
    assert lean.saved <= budget + outside < plain.saved / 1.5
    assert lean.peak <= plain.peak - plain.saved + budget + outside


@pytest.mark.parametrize("trial", range(4))
def test_tensors_sent_to_the_host_come_back_and_the_budget_holds(trial):
    """Gradients bitwise those without a schedule, with dropout; storages emptied while their tensors are away."""
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    torch.manual_seed(seed)
    stages = drawn_stages(draw)
    x = torch.randn(64, stages[0][0].in_features, dtype=torch.float64)
    outside = weights(stages)
    chain = replace(measured_chain(stages, x.requires_grad_(), outside), forward=[1] * len(stages))
    chain = replace(chain, backward=[2] * len(stages))
    budget = max(draw.uniform(0.5, 0.9) * save_everything(chain).peak, 1.02 * least_memory(chain))
    schedule = pofo(chain, budget, 0.3 * sum(chain.saved_size) / len(stages))
    seen: list[int] = []

    def run(x):
        transfers = Transfers(schedule.transfers, Streams(x.device), outside)
        scheduled = ScheduledRun(
            stages, schedule.operations, random=True, transfers=transfers, watch=partial(counted, seen, outside)
        )
        return scheduled.forward(x)

    plain, lean = gradients(stages, x, seed), gradients(stages, x, seed, run=run)
    assert all(torch.equal(a, b) for a, b in zip([plain[0], *plain[1]], [lean[0], *lean[1]], strict=True))
    assert max(seen) <= budget + 2 * SMALLEST * len(stages)  # what is too small to be worth a copy


def test_a_transfer_empties_its_storage_and_fills_it_again():
    """Views included, and without those that something else holds."""
    stages = [nn.Linear(64, 64).double() for _ in range(4)]
    x = torch.randn(32, 64, dtype=torch.float64).requires_grad_()
    chain = Chain(forward=[1] * 4, backward=[1] * 4, output_size=[1] * 4, saved_size=[4] * 4, input_size=1)
    found = offload(chain, save_everything(chain).operations, 12, 4.0)
    assert found is not None and found.transfers
    sizes = []
    run = ScheduledRun(
        stages,
        found.operations,
        transfers=Transfers(found.transfers, Streams(x.device), weights(stages)),
        watch=lambda run: sizes.extend(t.untyped_storage().nbytes() for t in run.named().get(("saved", 0), [])[-1:]),
    )
    run.forward(x).sum().backward()
    assert sizes[0] == sizes[-1] == 32 * 64 * 8 and 0 in sizes  # of its output, the last that it holds


def test_pofo_is_refused_with_a_pipeline():
    with pytest.raises(ConfigError, match="does not go with plan"):
        ParallelPlan(remat="pofo", pipeline=2, microbatches=2)
