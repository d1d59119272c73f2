"""What a plan makes of a prediction: each process's share of memory and time, and what --dry-run says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luban.core.opgraph import OpGraph
from luban.core.plan import ParallelPlan
from luban.models.describe import describe
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.moe.layer import MixtureOfExperts
from luban.nn.moe.top_k import TopK
from luban.planner.accelerators import Machine, accelerator
from luban.planner.distribution import Distribution
from luban.planner.memory import MemoryPrediction, StepSettings, predict_memory
from luban.planner.prediction import Prediction
from luban.planner.step_time import StepTime
from luban.planner.traffic import Spread

GRAPH: OpGraph = describe(
    uniform(
        vocab_size=64,
        width=32,
        context=16,
        layers=8,
        mixer=Grouped(heads=4, kv_heads=2),
        feedforward=SwiGLU(width=64),
        tied_head=True,
    ),
    batch=2,
    seq=16,
    dtype="float32",
)
COUNT = GRAPH.parameters
WHOLE = MemoryPrediction(
    parameters=4 * COUNT, optimizer=8 * COUNT, gradients=4 * COUNT, activations=800_000, transient=64_000
)
STEP = StepTime(matmul_seconds=8.0, attention_seconds=4.0, elementwise_seconds=2.0, update_seconds=2.0)


def distribution(pieces: int = 1, **fields) -> Distribution:
    return Distribution(Spread(GRAPH, ParallelPlan(**fields), pieces, 4))


@pytest.mark.parametrize(("zero", "divided"), [(1, 8 / 4), (2, 8 / 4 + 4 / 4), (3, 8 / 4 + 4 / 4)])
def test_zero_divides_optimizer_then_gradients_then_weights(zero, divided):
    found = distribution(shard=4, zero=zero).memory(WHOLE)
    state = found.optimizer + (found.gradients if zero > 1 else 0)
    assert state == pytest.approx(divided * COUNT, rel=1e-3)
    # all weights, of which a process's rows are a part; or shards, and of two layers of eight and what lies in no layer the whole
    outside = sum(op.parameters for op in GRAPH.ops if not op.layer)
    gathered = COUNT if zero < 3 else outside + (COUNT - outside) * 2 / 8
    assert found.parameters == pytest.approx(4 * (gathered + (COUNT / 4 if zero == 3 else 0)), rel=1e-3)
    assert found.activations == WHOLE.activations


def test_experts_are_divided_and_their_rows_counted():
    experts, width, inner, layers = 8, 32, 64, 2
    moe = MixtureOfExperts(width=inner, experts=experts, router=TopK(active=2))
    sizes = {"vocab_size": 64, "width": width, "context": 16, "layers": layers, "mixer": Grouped(heads=4)}
    graph = describe(uniform(**sizes, feedforward=moe), batch=2, seq=16)
    weights, routers = layers * experts * 3 * width * inner, layers * width * experts
    plan = ParallelPlan(shard=4, tensor=2, expert=4)
    spread = Spread(graph, plan, 3, 4)
    assert spread.apart(0) == (weights // 4, routers)
    assert spread.parameters(0) == Spread(graph, ParallelPlan(shard=4, tensor=2), 3, 4).parameters(0) - weights // 4
    sent = {(row.axis, row.collective, row.what): row.bytes for row in spread.traffic()}
    rows = layers * (2 * 16 * 2) // 2 * width * 4  # of a micro-batch's tokens two choices each, shared by tensor 2
    assert sent["expert", "all-to-all", "rows of experts"] == 3 * 4 * rows * 3 // 4
    assert sent["expert", "all-reduce", "gradients of experts"] == 2 * (weights // 4 * 4) // 2
    count = graph.parameters
    whole = MemoryPrediction(parameters=4 * count, optimizer=8 * count, gradients=4 * count, activations=0, transient=0)
    found = Distribution(spread).memory(whole)
    others = spread.parameters(0) - weights // 4 - routers
    assert found.optimizer == pytest.approx(8 * (others / 4 + weights // 4 + routers), abs=8)


def test_tensor_and_context_divide_activations_and_time():
    # the axis tensor gathers the inputs of two matmuls a layer, and they are saved whole
    whole = 4 * 2 * 8 * 2 * 16 * 32  # bytes, layers, rows, tokens, width
    for fields, gathered in (({"tensor": 2}, whole), ({"context": 2}, 0), ({"tensor": 2, "remat": "full"}, 0)):
        found = distribution(**fields)
        assert found.memory(WHOLE).activations == (WHOLE.activations + gathered) // 2
        assert found.step(STEP).total == STEP.total / 2
    norms = sum(op.parameters for op in GRAPH.ops if op.role == "norm")
    assert distribution(tensor=2).spread.parameters(0) == (COUNT - norms) // 2 + norms
    assert distribution(context=2).memory(WHOLE).parameters == WHOLE.parameters


def test_a_pipeline_divides_layers_keeps_inputs_and_waits():
    gpipe, flushed = (distribution(8, pipeline=4, microbatches=8, schedule=name) for name in ("gpipe", "1f1b"))
    assert gpipe.memory(WHOLE).activations == 8 * WHOLE.activations // 4
    assert flushed.memory(WHOLE).activations == 4 * WHOLE.activations // 4  # the first process, with the table
    assert flushed.process_memory(WHOLE, 3).activations == WHOLE.activations // 4
    assert flushed.bubble == 0.375 and flushed.step(STEP).total == pytest.approx(STEP.total / 4 * 1.375)
    table, norm = 64 * 32, 32
    layer = (COUNT - table - norm) // 8
    assert [flushed.spread.parameters(p) for p in range(4)] == [
        2 * layer + table,
        2 * layer,
        2 * layer,
        2 * layer + table + norm,  # the output layer's copy of the table
    ]
    interleaved = distribution(8, pipeline=4, microbatches=8, schedule="interleaved")
    assert interleaved.bubble == 0.1875
    assert distribution(8, pipeline=4, microbatches=8, schedule="pipedream").bubble == 0


def test_uneven_stages_take_the_time_and_memory_of_the_longest():
    """(M − 1) times the slowest stage and once through all; activations of the first process's six of eight layers."""
    pieces = 4
    uneven = distribution(pieces, pipeline=2, microbatches=pieces, stage_layers=(6, 2))
    assert uneven.step(STEP).total == pytest.approx(STEP.total / pieces * ((pieces - 1) * 6 / 8 + 1))
    assert uneven.process_memory(WHOLE, 0).activations == 2 * WHOLE.activations * 6 // 8
    assert uneven.process_memory(WHOLE, 1).activations == WHOLE.activations * 2 // 8
    three = distribution(pieces, pipeline=3, microbatches=pieces)  # 3, 3 and 2 layers
    assert three.step(STEP).total == pytest.approx(STEP.total / pieces * ((pieces - 1) * 3 / 8 + 1))


def test_only_the_ends_of_a_pipeline_sum_the_tied_table():
    spread = distribution(4, pipeline=4, microbatches=4).spread
    sent = [[row.bytes for row in spread.traffic(p) if row.what == "gradients of the tied table"] for p in range(4)]
    assert sent == [[64 * 32 * 4], [], [], [64 * 32 * 4]]  # an all-reduce of two processes: 2 · (2 − 1)/2 of it


def test_pipedream_keeps_versions_of_the_weights_and_sums_gradients_of_every_micro_batch():
    pieces = 4
    stale, flushed = (
        distribution(pieces, pipeline=2, replicate=2, microbatches=pieces, schedule=name)
        for name in ("pipedream", "1f1b")
    )
    for process, versions in ((0, 1), (1, 0)):  # beside the newest
        more = stale.process_memory(WHOLE, process).parameters - flushed.process_memory(WHOLE, process).parameters
        assert more == versions * 4 * stale.spread.parameters(process)
    sums = [next(row.bytes for row in each.spread.traffic(0) if row.axis == "replicate") for each in (stale, flushed)]
    assert sums[0] == pieces * sums[1] == pieces * 2 * (stale.spread.parameters(0) * 4 // 2)


def test_the_dry_run_says_who_sends_what_and_draws_the_schedule():
    text = "\n".join(distribution(4, pipeline=2, microbatches=4, tensor=2).lines(picture=True))
    for part in (
        "plan    4 processes: pipeline 2 × tensor 2",
        "tensor all-gather of hidden states",
        "pipeline send of hidden states and gradients",
        "bubble  25.0% of the working time: 1f1b, 4 micro-batches in 2 stages",
        "micro-batches kept at once by each process: 2, 1",
        "process 0   F0·F1·      B0·B0·F2·",
    ):
        assert part in text, text
    stale = "\n".join(distribution(8, pipeline=4, microbatches=8, schedule="pipedream").lines())
    assert "behind, at most, in each process: 3, 2, 1, 0" in stale and "stale" not in text, stale
    assert "no schedule to draw" in distribution(shard=2).lines(picture=True)[-1]


def test_a_run_of_several_accelerators_counts_all_of_them():
    one = Prediction(
        active_parameters=0,
        parameters=COUNT,
        memory=WHOLE,
        free_bytes=10**9,
        resident_bytes=0,
        machine=Machine(name="H100", accelerator=accelerator("h100-sxm")),
        on_cpu=False,
        tokens_per_step=1000,
        steps=225,
        model_flops=16 * 989.4e12 / 2,
        precision="bf16",
        step=STEP,
    )
    several = one.over(distribution(shard=2, tensor=2))
    assert several.tokens_per_step == 2000 and several.step.total == 8  # two readers, each of two processes
    text = "\n".join(several.lines())
    assert "MFU 50.0%" in text and "2 accelerator-hours, at most 1.4 kWh (700 W each)" in text, text
    figures = several.figures()
    assert figures["peak_flops"] == 4 * 989.4e12 and figures["accelerator_watts"] == 2800
    assert figures["model_flops_per_step"] == 2 * one.model_flops


AWAY = MemoryPrediction(parameters=2 * COUNT, optimizer=0, gradients=2000, activations=800_000, transient=64_000)
HALF = replace(GRAPH, dtype="bfloat16")
OUTSIDE = sum(op.parameters for op in GRAPH.ops if not op.layer)


@pytest.mark.parametrize(
    ("fields", "pieces", "device", "gradients", "host", "disk"),
    [
        # bytes of a parameter: half-precision weights whole; state 12, sums and arriving rows 4 each, rounded rows 2, of a quarter
        ({"shard": 4, "zero": 2, "offload": "cpu"}, 2, 2 * COUNT, 2000, (12 + 4 + 4 + 2) * COUNT / 4, 0),
        ({"shard": 4, "zero": 1, "offload": "cpu"}, 2, 2 * COUNT, 2000 + 4 * COUNT, 22 * COUNT / 4, 0),
        ({"shard": 4, "zero": 2, "offload": "cpu", "offload_delay": True}, 2, 2 * COUNT, 2000, 26 * COUNT / 4, 0),
        # pieces of state instead, three of each process's numbers at most
        ({"shard": 4, "zero": 2, "offload": "disk"}, 2, 2 * COUNT, 2000, (36 + 10) * COUNT / 4, 12 * COUNT / 4),
        # two of eight layers gathered, whose fp32 shards come to the device; gradients of a micro-batch and their sums
        (
            {"shard": 4, "offload": "cpu"},
            2,
            2 * OUTSIDE + (2 + 4 / 4) * (COUNT - OUTSIDE) * 2 / 8,
            2000,
            (12 + 8) * COUNT / 4,
            0,
        ),
        ({"shard": 4, "offload": "cpu"}, 1, 2 * OUTSIDE + 3 * (COUNT - OUTSIDE) / 4, 2000, 16 * COUNT / 4, 0),
    ],
)
def test_offloaded_shards_are_counted_where_they_are(fields, pieces, device, gradients, host, disk):
    folder = "x" if "disk" in fields.values() else ""
    plan = ParallelPlan(**fields, offload_folder=folder)
    found = Distribution(Spread(HALF, plan, pieces, 2), offloads=True)
    memory, outside = found.memory(AWAY), found.host()
    assert memory.parameters == pytest.approx(device, abs=4) and memory.optimizer == 0
    assert memory.gradients == pytest.approx(gradients, abs=4)
    assert outside.total == pytest.approx(host, abs=40) and outside.disk == pytest.approx(disk, abs=40)


def test_what_is_on_the_disk_is_not_in_memory():
    """One process, bf16 on a GPU: state 12, sums 4 and layers' weights 2 bytes a parameter in the file; in memory pieces of state, a
    layer's gradients on their way, the rounded weights outside of layers and two layers that are read ahead."""
    inside = COUNT - OUTSIDE
    plan = ParallelPlan(offload="disk", offload_gradients="disk", offload_weights="disk", offload_folder="x")
    host = Distribution(Spread(HALF, plan, 2, 2), offloads=True).host()
    assert host.disk == 16 * COUNT + 2 * inside
    assert host.total == 36 * COUNT + 2 * (inside // 8) + 2 * (OUTSIDE + 2 * (inside // 8))
    settings = StepSettings(offloads=True, layers_here=3)
    here = predict_memory(HALF, settings).parameters
    assert here == 2 * (OUTSIDE + 3 * inside // 8)
