"""What an uncompiled step on a CPU will take, found without taking it, beside what one takes; compiled ones as well."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import torch
from drawn import drawn
from torch.profiler import ProfilerActivity, profile

from luban.core.config import Partial, merge
from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.data.batch import Batch
from luban.models.config import ModelConfig
from luban.train import trace_memory as traces
from luban.train.recipe import Recipe
from luban.train.run import _sample, assemble, prepare
from luban.train.trace_memory import trace_memory, trace_time

WIDE = {"model": {"width": 64, "layer": {"feedforward": {"width": 160}}}, "train": {"batch_size": 16, "seq_len": 64}}


def bytes_of_a_step(recipe: Recipe) -> tuple[int, int]:
    """(predicted, measured) bytes at the peak of the second step: of all that torch allocates for it, and what lasts."""
    _, shards, start, device, prediction = prepare(recipe)
    parts = assemble(recipe, shards, start, device)
    batches, engine = parts.loader.iterate(), parts.engine
    engine.step(next(batches))
    batch = next(batches)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        engine.step(batch)
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    params = engine.params
    sums = [tensor for memory in params._kept._memory for tensor in memory.values()]  # since the first step
    lasting = [*params.parameters.values(), *params.working.values(), *engine.optimizer.state_dict().values(), *sums]
    once = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in lasting}
    return prediction.memory.total, sum(once.values()) + peak


CASES = {
    "fp32": {},
    "bf16": {"train": {"precision": "bf16"}},
    "bf16 weights": {"train": {"precision": "bf16", "weights": "bf16"}},
    "micro-batches": {"train": {"precision": "bf16", "accumulate": 4}},
    "full": {"plan": {"remat": "full"}},
    "more weights than rows": {
        "model": {"width": 256, "layer": {"feedforward": {"width": 768}}},
        "train": {"precision": "bf16", "batch_size": 1, "seq_len": 8},
    },
    "Muon": {
        "model": {"width": 256, "layers": 4, "layer": {"feedforward": {"width": 768}}},
        "optim": {"type": "muon"},
        "train": {"precision": "bf16", "batch_size": 1, "seq_len": 8},
    },
    "selective": {"train": {"precision": "bf16"}, "plan": {"remat": "selective"}},
    "alibi": {"model": {"position": {"type": "alibi"}}, "train": {"precision": "bf16"}},
    "block-sparse": {"model": {"layer": {"mixer": {"layout": {"type": "global_random", "block": 16, "window": 16}}}}},
    "encoder–decoder": {
        "model": {"body": {"type": "encoder_decoder"}, "position": {"type": "t5"}},
        "objective": {"type": "span_corruption"},
    },
    "encoder–decoder with windows": {
        "model": {
            "body": {"type": "encoder_decoder"},
            "position": {"type": "t5"},
            "encoder": {"layers": 2, "layer": {"mixer": {"window": 9}}},
            "layer": {"mixer": {"layout": {"type": "strided", "block": 16}}},
        },
        "objective": {"type": "span_corruption"},
    },
}


@pytest.mark.parametrize("name", drawn(CASES, 4))
def test_an_uncompiled_step_takes_the_memory_that_was_predicted(tiny, name):
    predicted, measured = bytes_of_a_step(tiny(**merge(WIDE, CASES[name])))
    assert predicted == pytest.approx(measured, rel=0.03)  # kernels' own buffers, a few kB, aren't seen


COMPILED = {
    "bf16": {"train": {"precision": "bf16"}},
    "fp32": {},
    "longer rows": {"train": {"precision": "bf16", "seq_len": 256, "batch_size": 8}, "model": {"context": 256}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step_takes_the_memory_that_was_predicted(tiny, name):
    shape = {
        "model": {
            "width": 256,
            "layers": 4,
            "layer": {"mixer": {"heads": 4, "kv_heads": 2}, "feedforward": {"width": 768}},
        },
        "train": {"compile": True, "batch_size": 32, "seq_len": 64},
    }
    predicted, measured = bytes_of_a_step(tiny(**merge(shape, COMPILED[name])))
    assert predicted == pytest.approx(measured, rel=0.05)


def test_a_recurrent_body_is_not_known_and_the_prediction_says_so(tiny):
    recipe = tiny()
    recipe = replace(recipe, model=Partial(ModelConfig, {"width": 32, "body": {"type": "recurrent", "layers": 2}}))
    _, shards, start, _, prediction = prepare(recipe)
    assert trace_memory(recipe, start.spec, _sample(recipe, shards, 1)) is None
    assert any("recurrent" in caveat for caveat in prediction.caveats)
    assert "caveat  a recurrent body" in "\n".join(prediction.lines()) and "recurrent" in prediction.summary()
    assert prediction.figures()["prediction_caveats"] == list(prediction.caveats)
    assert not any("recurrent" in caveat for caveat in prepare(tiny())[-1].caveats)


def test_a_step_s_time_is_that_of_layers_and_rows(tiny, monkeypatch):
    recipe = tiny(model={"layers": 7}, train={"batch_size": 24, "accumulate": 2})
    _, shards, start, *_ = prepare(recipe)
    seen = []

    def seconds(_recipe, spec, batch):
        seen.append(batch["tokens"].shape)
        return len(batch["tokens"]) * (0.5 + 2 * len(spec.layers))

    monkeypatch.setattr(traces, "_seconds", seconds)
    rows: Batch = _sample(recipe, shards, 3)
    assert trace_time(recipe, start.spec, rows) == pytest.approx(12 * (0.5 + 2 * 7))
    assert seen == [(3, 32), (3, 32)]
    monkeypatch.setattr(traces, "PROBE", 1)  # a row alone is more than that
    assert trace_time(recipe, start.spec, rows) == pytest.approx(12 * (0.5 + 2 * 7)) and seen[-1] == (1, 32)


def test_traces_leave_nothing_behind(tiny):
    recipe = tiny()
    _, shards, start, *_ = prepare(recipe)
    before = torch.get_rng_state()
    trace_memory(recipe, start.spec, _sample(recipe, shards, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.empty(1).device.type == "cpu" and type(torch.empty(1)) is torch.Tensor


def test_rows_are_laid_out_once_for_prediction_and_training(tiny, monkeypatch):
    calls, recipe = [], tiny()
    laid = type(recipe.objective).examples
    monkeypatch.setattr(type(recipe.objective), "examples", lambda *a, **k: calls.append(1) or laid(*a, **k))
    _, shards, start, device, _ = prepare(recipe)
    assemble(recipe, shards, start, device)
    assert len(calls) == 1


@pytest.mark.parametrize("deep", [False, True], ids=["one layer", "several"])
def test_the_least_budget_that_a_refusal_names_is_enough(tiny, deep):
    """As a size and as a share: the run is predicted, and its first step finds a schedule for what the layers really save."""
    layers = random.randint(4, 9) if deep else 1
    recipe = tiny(**merge(WIDE, {"model": {"layers": layers}, "plan": {"remat": "rotor", "remat_budget": "1B"}}))
    with pytest.raises(ConfigError, match=r"plan\.remat_budget 1B is too small") as refused:
        prepare(recipe)
    named = re.search(r"use (\S+), or (\S+%)", str(refused.value))
    assert named is not None
    for enough in named.groups():
        _, shards, start, device, _ = prepare(replace(recipe, plan=ParallelPlan(remat="rotor", remat_budget=enough)))
        parts = assemble(replace(recipe, plan=ParallelPlan(remat="rotor", remat_budget=enough)), shards, start, device)
        assert parts.engine.step(next(parts.loader.iterate())).loss > 0
