"""Sharding found by itself: specs completed from a few, integer programs against brute force, stages against every division."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from luban.core.errors import ConfigError, UnsupportedError
from luban.models.describe import describe
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.feedforward.plain import GELU
from luban.nn.mixer.grouped import Grouped
from luban.nn.moe.layer import MixtureOfExperts
from luban.nn.norm import RMSNorm
from luban.planner.cluster import Cluster, Link
from luban.planner.machine import machine_table
from luban.planner.memory import StepSettings
from luban.planner.search.estimate import Candidate, Workload
from luban.planner.search.layers import Model
from luban.planner.search.messages import Messages
from luban.planner.sharding.alpa import Search, as_plan, cross_mesh
from luban.planner.sharding.inter import best_stages, exhaustive, submeshes
from luban.planner.sharding.intra import Problem, brute_force, problem_of, solve
from luban.planner.sharding.ir import Node, Program, Value, program_of, spec_of
from luban.planner.sharding.mesh import Mesh
from luban.planner.sharding.passes import Inserted, collectives, explained, fuse, megatron_annotations
from luban.planner.sharding.propagate import propagate
from luban.planner.sharding.strategies import strategies

highspy = pytest.importorskip("highspy")
CLUSTER = Cluster(gpu="a100-80gb", nodes=4, gpus_per_node=8, between=Link(bandwidth=25, latency_us=10))
TABLE = machine_table("a100-80gb")


def mesh(data: int, model: int, cluster: Cluster = CLUSTER) -> Mesh:
    return Mesh(Messages(cluster, TABLE), (data, model))


@cache
def graph_of(kind: str, layers: int = 1, width: int = 2048, seq: int = 512):
    inner = {
        "gelu": GELU(width=4 * width),
        "swiglu": SwiGLU(width=3 * width),
        "head norms": SwiGLU(width=3 * width),
        "experts": MixtureOfExperts(width=2 * width, experts=8),
    }[kind]
    mixer = Grouped(heads=16, kv_heads=4, qk_norm=RMSNorm()) if kind == "head norms" else Grouped(heads=16)
    spec = uniform(vocab_size=512, width=width, layers=layers, context=seq, mixer=mixer, feedforward=inner)
    return describe(spec, batch=1, seq=seq, dtype="bfloat16")


def layer_program(kind: str, rows: int) -> Program:
    return fuse(program_of(next(iter(graph_of(kind).layers().values())), rows))


def two_matmuls(rows: int = 4, tokens: int = 512, width: int = 4096) -> Program:
    """x → up → gelu → down, without anything around them."""
    sizes = {"x": (rows, tokens, width), "h": (rows, tokens, 4 * width), "g": (rows, tokens, 4 * width)}
    sizes["y"] = (rows, tokens, width)
    values = {name: Value(name=name, sizes=size, itemsize=2) for name, size in sizes.items()}
    for name, size in (("w1", (width, 4 * width)), ("w2", (4 * width, width))):
        values[name] = Value(name=name, sizes=size, itemsize=2, weight=True)
    flops = 2.0 * rows * tokens * 4 * width**2
    b_t_e = ("b", "t", "e")
    nodes = (
        Node(
            name="up",
            kind="linear",
            inputs=(("x", ("b", "t", "i")), ("w1", ("i", "o"))),
            output=("h", ("b", "t", "o")),
            flops=flops,
        ),
        Node(name="gelu", kind="activation", inputs=(("h", b_t_e),), output=("g", b_t_e), moved=1e6),
        Node(
            name="down",
            kind="linear",
            inputs=(("g", ("b", "t", "i")), ("w2", ("i", "o"))),
            output=("y", ("b", "t", "o")),
            flops=flops,
        ),
    )
    return Program(nodes=nodes, values=values)


@pytest.mark.parametrize("tokens", [1, 512])
def test_an_mlp_is_divided_by_columns_and_then_by_rows(tokens):
    """With weights that must be divided over eight devices, one reduction forward and one backward, as Megatron's."""
    program = two_matmuls(rows=1, tokens=tokens)
    problem = problem_of(program, mesh(1, 8), TABLE, 4, boundary={"x": ((), (), ()), "y": ((), (), ())})
    found = solve(problem, sum(v.bytes for v in program.values.values() if v.weight) / 8)
    up, gelu, down = found.chosen
    assert up.assignment == {"o": (1,)} and gelu.assignment == {"e": (1,)} and down.assignment == {"i": (1,)}


def drawn_problem(seed: int) -> Problem:
    """A chain with skips, every node with a few strategies of random costs."""
    rng = random.Random(seed)
    program = layer_program("gelu", 4)
    nodes = program.nodes[: rng.randint(4, 10)]
    program = replace(program, nodes=nodes)
    m = mesh(*rng.choice([(2, 4), (4, 2), (1, 8), (8, 1)]))
    options = []
    for node in nodes:
        every = strategies(program, node, m, TABLE, 4)
        kept = rng.sample(every, min(len(every), 3))
        options.append([replace(each, messages=rng.random(), compute=rng.random()) for each in kept])
    edges = {}
    for u in range(1, len(nodes)):
        for v in rng.sample(range(u), min(u, rng.randint(1, 2))):
            edges[v, u] = [[rng.choice([0.0, rng.random()]) for _ in options[u]] for _ in options[v]]
    return Problem(program=program, options=options, edges=edges)


@pytest.mark.parametrize("trial", range(6))
def test_the_integer_program_finds_what_brute_force_finds(trial):
    problem = drawn_problem(random.randrange(10**9))
    assert solve(problem).seconds == pytest.approx(brute_force(problem).seconds, rel=1e-6)


def test_real_costs_too_and_a_bound_on_weights():
    program = two_matmuls(rows=8)
    for sizes in ((4, 8), (8, 1), (2, 2)):
        problem = problem_of(program, mesh(*sizes), TABLE, 8, outer=None)
        found, best = solve(problem), brute_force(problem)
        assert found.seconds == pytest.approx(best.seconds, rel=1e-6)
        bound = sum(v.bytes for v in program.values.values() if v.weight) / sizes[1]
        bounded = solve(problem, bound)
        assert bounded.weight_bytes <= bound * (1 + 1e-6) and bounded.seconds >= found.seconds * (1 - 1e-9)
    with pytest.raises(ConfigError):
        solve(problem, 1.0)


def test_every_strategy_computes_the_matmul():
    """Executed with numpy: each device's part by the strategy's specs; partial sums added up; the result is the product."""
    rng = np.random.default_rng()
    program = two_matmuls(rows=4, tokens=8, width=8)
    node, sizes = program.nodes[0], (2, 2)
    x, w = rng.normal(size=(4, 8, 8)), rng.normal(size=(8, 32))
    for strategy in strategies(program, node, mesh(*sizes), TABLE, 1):
        partial = [axis for label in node.summed for axis in strategy.assignment.get(label, ())]
        total = np.zeros((4, 8, 32))
        for place in np.ndindex(*sizes):
            xs, ws = (part(array, spec, place, sizes) for array, spec in zip((x, w), strategy.inputs, strict=True))
            made = spec_of(node.output[1], strategy.assignment)
            copies = np.prod(
                [n for axis, n in enumerate(sizes) if axis not in {a for d in made for a in d} | {*partial}]
            )
            total[cut((4, 8, 32), made, place, sizes)] += x[xs] @ w[ws] / copies
        np.testing.assert_allclose(total, x @ w, atol=1e-12)


def cut(shape, spec, place, sizes):
    found = []
    for size, dim in zip(shape, spec, strict=True):
        begin, length = 0, size
        for axis in dim:
            length //= sizes[axis]
            begin += place[axis] * length
        found.append(slice(begin, begin + length))
    return tuple(found)


def part(array, spec, place, sizes):
    return cut(array.shape, spec, place, sizes)


def test_resharding_is_free_where_nothing_is_sent_forward_or_back():
    value, m = Value(name="x", sizes=(8, 8, 8), itemsize=2), mesh(2, 4)
    whole, rows, tokens = ((), (), ()), ((1,), (), ()), ((), (1,), ())
    assert m.reshard(value, rows, rows) == 0
    gather = m.seconds("all-gather", value.bytes, 1)
    assert m.reshard(value, rows, whole) == pytest.approx(gather)  # its gradient is cut, which is free
    assert m.reshard(value, whole, rows) == pytest.approx(gather)  # here the gradient is gathered
    assert m.reshard(value, rows, tokens) == pytest.approx(2 * m.seconds("all-to-all", value.bytes / 4, 1))


@pytest.mark.parametrize("kind", ["gelu", "swiglu", "head norms", "experts"])
def test_a_few_annotations_complete_a_layer(kind):
    """Weights and rows are said; what Megatron does everywhere else is found: two all-reduces a layer, or an all-to-all there and
    back for experts."""
    program = layer_program(kind, 8)
    tokens = next(iter(graph_of(kind).layers().values())).inputs[0].name
    said = megatron_annotations(program, tokens=tokens)
    sharded = propagate(program, said, (8, 4))
    for node in program.nodes:
        assert any(0 in dim for dim in sharded.specs[node.output[0]]), node.name
    attention = next(node for node in program.nodes if node.kind == "attention")
    assert sharded.specs[attention.output[0]] == ((0,), (), (1,))
    sent = [each for each in collectives(sharded) if isinstance(each, Inserted)]
    reduced = [each for each in sent if each.collective == "all-reduce"]
    assert all(each.axis == 1 for each in reduced)
    assert len(reduced) == (1 if kind == "experts" else 2)
    assert {each.collective for each in sent if each.axis == 1} == {"all-reduce"}
    assert [each.collective for each in sent if each.axis == 0] == ["all-to-all"] * (2 if kind == "experts" else 0)


def test_heads_that_are_normed_are_divided_by_whole_heads_as_without_norms():
    """Norms of queries and keys change nothing of what a search finds: weights that must be divided are by columns, then by rows."""
    chosen = {}
    for kind in ("swiglu", "head norms"):
        program = layer_program(kind, 1)
        assert all("n" not in node.labels for node in program.nodes)
        problem = problem_of(program, mesh(1, 8), TABLE, 4)
        least = sum(min(s.weight_bytes for s in options) for options in problem.options)
        found = zip(program.nodes, solve(problem, 1.001 * least).chosen, strict=True)
        chosen[kind] = {node.name: s.assignment for node, s in found if node.flops or node.name.endswith("q_norm")}
    assert chosen["head norms"].pop("decoder.blocks.0.mixer.q_norm") == {"h": (1,)}
    assert chosen["head norms"] == chosen["swiglu"]
    by_heads = {node.name: node.units for node in layer_program("head norms", 8).nodes if node.units}
    assert by_heads["decoder.blocks.0.mixer.qkv.q"] == {"o": 16}


def test_propagation_goes_backwards_and_keeps_what_is_said():
    program = two_matmuls()
    sharded = propagate(program, {"y": ((0,), (), ())}, (2, 2))
    assert sharded.specs["x"] == sharded.specs["h"] == ((0,), (), ())
    assert sharded.specs["w1"] == ((), ())
    kept = propagate(program, {"w1": ((), (1,)), "g": ((), (), ())}, (2, 2))
    assert kept.specs["g"] == ((), (), ())
    assert any(each.collective == "all-gather" for each in collectives(kept) if isinstance(each, Inserted))


@pytest.mark.parametrize(
    ("annotated", "said"),
    [
        ({"z": ((),)}, "no tensor z"),
        ({"x": ((0,), (0,), ())}, "once at most"),
        ({"x": ((2,), (), ())}, "once at most"),
        ({"x": ((0,),)}, "3 dimensions"),
    ],
)
def test_annotations_that_are_wrong_are_refused(annotated, said):
    with pytest.raises(ConfigError, match=said):
        propagate(two_matmuls(), annotated, (2, 2))


def test_uneven_annotations_are_refused():
    with pytest.raises(ConfigError, match="3 devices can't divide the 4 of x"):
        propagate(two_matmuls(), {"x": ((0,), (), ())}, (3, 2))


def test_passes_show_the_program_before_and_after_each():
    layer = next(iter(graph_of("swiglu").layers().values()))
    said = megatron_annotations(program_of(layer, 2), tokens=layer.inputs[0].name)
    text = "\n".join(explained(layer, 2, said, (2, 4)))
    assert text.count("activation feedforward.gate(") == 1  # before fuse, and not after
    assert "all-reduce of mixer.output over mesh1" in text
    for heading in ("after fuse:", "after shard over a mesh of 2 × 4", "after collectives:"):
        assert heading in text


@pytest.mark.parametrize("trial", range(8))
def test_stages_are_those_of_an_exhaustive_search(trial):
    rng = random.Random(random.randrange(10**9))
    groups, per_node, nodes = rng.randint(1, 8), rng.choice([2, 4]), rng.randint(1, 2)
    devices = min(per_node * nodes, 4 if groups > 5 else 8)
    sizes = [n for n in submeshes(nodes, per_node) if n <= devices]
    work = [rng.uniform(0.5, 2) for _ in range(groups)]
    awkward = {
        (k, j, n, s): rng.uniform(0.8, 1.3) for k in range(9) for j in range(9) for n in range(9) for s in range(9)
    }

    def time(k, j, number, later):
        if rng_fits[k, j, number, later] < 0.15:
            return float("inf")
        return sum(work[k:j]) / sizes[number] ** 0.8 * awkward[k, j, number, later]

    rng_fits = {key: rng.random() for key in awkward}
    micro_batches = rng.choice([1, 4, 16])
    wanted = exhaustive(groups, devices, sizes, micro_batches, time)
    if wanted == float("inf"):
        with pytest.raises(UnsupportedError):
            best_stages(groups, devices, sizes, micro_batches, time)
        return
    found = best_stages(groups, devices, sizes, micro_batches, time)
    assert found.seconds == pytest.approx(wanted)
    assert [first for first, _, _ in found.cuts[1:]] == [past for _, past, _ in found.cuts[:-1]]
    assert sum(sizes[number] for _, _, number in found.cuts) == devices


def workload(kind: str, layers: int, batch: int, cluster: Cluster) -> Workload:
    settings = StepSettings(gpu_kernels=True)
    model = Model(graph_of(kind, layers), settings, TABLE, Messages(cluster, TABLE), "bf16")
    return Workload(model, batch, 512, settings)


@pytest.mark.parametrize("kind", ["swiglu", "experts"])
def test_alpa_finds_a_plan_no_slower_than_those_that_it_contains(kind):
    """Among them one stage with data parallelism, and equal stages of one node each, as its own cost model prices them."""
    cluster = replace(CLUSTER, nodes=2, gpus_per_node=4)
    search = Search(workload(kind, 4, 32, cluster), cluster, 4)
    found = search.run(gap=0.0)
    assert sum(found.sizes[number] for _, _, number in found.stages.cuts) == 8
    assert found.layers(0)[0] == 0 and found.layers(len(found.variants) - 1)[1] == 4
    whole = search._stage(search._counts(0, 4), 8, 1, 3)[0]
    halves = [search._stage(search._counts(2 * s, 2 * s + 2), 4, 2 - s, s + 1)[0] for s in range(2)]
    assert found.seconds <= min(4 * whole, sum(halves) + 3 * max(halves)) * (1 + 1e-9)
    plan, reasons = as_plan(found, 4)
    if plan is not None:
        assert plan.processes == 8
    for stage in range(len(found.variants) - 1):
        senders, receivers, pieces = cross_mesh(found, stage)
        assert pieces >= max(senders, receivers) / 2
    assert all(isinstance(reason, str) for reason in reasons)


def test_experts_are_divided_when_their_weights_must_be():
    """Expert parallelism is found: a mixture's experts over an axis, rows sent to them and back."""
    program = layer_program("experts", 8)
    problem = problem_of(program, mesh(1, 8), TABLE, 4)
    least = sum(min(s.weight_bytes for s in options) for options in problem.options)
    found = solve(problem, 1.05 * least)
    experts = [s for node, s in zip(program.nodes, found.chosen, strict=True) if "experts" in node.name]
    assert experts and all("n" in s.assignment or "o" in s.assignment or "i" in s.assignment for s in experts)


def test_memory_forces_more_devices_or_recomputation():
    cluster = replace(CLUSTER, nodes=1, gpus_per_node=4)
    free = Search(workload("gelu", 4, 64, cluster), cluster, 8).run()
    tight = replace(cluster, memory=7.0)
    lean = Search(workload("gelu", 4, 64, tight), tight, 8).run()
    assert lean.seconds >= free.seconds
    with pytest.raises(UnsupportedError, match="fits into their memory"):
        nothing = replace(cluster, memory=0.3)
        Search(workload("gelu", 4, 64, nothing), nothing, 8).run()


def test_a_found_plan_is_one_that_the_estimate_prices():
    cluster = replace(CLUSTER, nodes=2, gpus_per_node=4)
    load = workload("gelu", 8, 32, cluster)
    found = Search(load, cluster, 8).run()
    plan, _ = as_plan(found, 8)
    if plan is not None:
        estimate = load.estimate(
            Candidate(plan=plan, accumulate=found.micro_batches, rows=max(found.rows // plan.readers, 1))
        )
        assert estimate.seconds > 0


@pytest.mark.slow  # about ten seconds: the published size
def test_a_175b_model_on_1024_gpus_is_searched_in_half_a_minute():
    import time

    from luban.models.presets import _gpt

    cluster = replace(CLUSTER, nodes=128)
    graph = describe(_gpt(51200, 12288, 96, 96, 2048), batch=1, seq=2048, dtype="bfloat16")
    settings = StepSettings(gpu_kernels=True)
    model = Model(graph, settings, TABLE, Messages(cluster, TABLE), "bf16")
    began = time.process_time()
    found = Search(Workload(model, 1536, 2048, settings), cluster, 96).run()
    assert time.process_time() - began < 30
    plan, _ = as_plan(found, 96)
    assert plan is not None and plan.tensor == 8 and plan.processes == 1024
