"""Half-precision weights and gradients outside of the device, too: the same training."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from drawn import drawn
from families import FAMILIES, engine_of

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan
from luban.models.describe import describe
from luban.models.stack import blocks_of
from luban.parallel.offload.host_params import HostParams
from luban.parallel.offload.layer_weights import FromDisk, LayerWeights
from luban.parallel.offload.pools import DiskPool
from luban.planner.distribution import Distribution
from luban.planner.traffic import Spread

DECODER = FAMILIES["decoder"]
DEEP = replace(DECODER, spec=replace(DECODER.spec, layers=DECODER.spec.layers[:1] * 6))
EVERY = [
    {"offload": offload, "offload_gradients": gradients, "offload_weights": weights, "remat": remat}
    for offload, gradients, weights, remat in product(
        ["cpu", "disk"], ["cpu", "disk"], ["none", "cpu", "disk"], ["none", "selective", "full"]
    )
    if (offload, gradients) != ("cpu", "disk") and (gradients == "disk" or weights != "none")
]


def trained(family, plan: ParallelPlan, seed: int, steps: int = 3, **settings):
    """An engine after some steps, what they gave, and what a held-out batch gives in their middle."""
    engine = engine_of(family, seed=seed, plan=plan, accumulate=2, **settings)
    found = []
    for n in range(steps):
        result = engine.step(family.batch(8, np.random.default_rng([seed, n])))
        found += [result.loss, result.grad_norm]
        if n == 1:
            found.append(engine.evaluate(family.batch(8, np.random.default_rng(99))).loss)
    return engine, found


def in_memory(engine) -> list[int]:
    """Blocks any of whose weights are on the device."""
    return [
        index
        for index, block in enumerate(blocks_of(engine.model))
        if any(p.untyped_storage().nbytes() for p in block.parameters())
    ]


@pytest.mark.parametrize(("fields", "precision"), drawn(product(EVERY, ["fp32", "bf16", "fp64"]), 3))
def test_training_is_that_of_one_pool(fields, precision, tmp_path, monkeypatch):
    """Bit by bit: losses, norms, held-out losses, weights, moments; what is saved is taken up. Of six layers two are on the device
    at most (three on a GPU, to which the next one comes meanwhile)."""
    seed = random.randrange(10**6)
    folder = str(tmp_path) if "disk" in fields.values() else ""
    plan, most = ParallelPlan(**fields, offload_folder=folder), []
    remat = {"remat": fields["remat"]}
    plain, expected = trained(DEEP, ParallelPlan(**remat), seed, precision=precision)
    fetch = LayerWeights._fetch

    def counted(self, layer):
        fetch(self, layer)
        most.append(sum(any(w.untyped_storage().nbytes() for w in each) for each in self.weights))

    monkeypatch.setattr(LayerWeights, "_fetch", counted)
    away, found = trained(DEEP, plan, seed, precision=precision)
    assert found == expected
    assert isinstance(away.params, HostParams)
    ours, theirs = away.state_dict(), plain.state_dict()
    for part in ("model", "optimizer"):
        assert ours[part].keys() == theirs[part].keys()
        for name, tensor in theirs[part].items():
            assert torch.equal(ours[part][name], tensor), name
    if plan.offload_weights != "none":
        # every layer forward and backward in every micro-batch, and in the held-out batch
        assert len(most) == 6 * (2 * 2 * 3 + 1) and max(most) == 2
        assert not in_memory(away)  # after an update all of them are old
    other, _ = trained(DEEP, plan, seed + 1, steps=1, precision=precision)
    other.load_state_dict(theirs)
    batch = DEEP.batch(8, np.random.default_rng(98))
    assert other.step(batch).loss == plain.step(batch).loss


@pytest.mark.parametrize("name", drawn(sorted(FAMILIES), 2))
def test_other_families(name, tmp_path):
    """Layers that are shared, that read an encoder, mixtures of experts: whatever stands in blocks."""
    family, seed = FAMILIES[name], random.randrange(10**6)
    plan = ParallelPlan(offload="cpu", offload_weights="disk", offload_folder=str(tmp_path))
    if any(block.reversible for block in blocks_of(engine_of(family, seed=seed).model)):
        with pytest.raises(ConfigError, match="reversible"):
            trained(family, plan, seed)
        return
    assert trained(family, plan, seed, steps=2)[1] == trained(family, ParallelPlan(), seed, steps=2)[1]


def test_delayed_updates_with_everything_on_the_disk(tmp_path):
    """As those with weights and gradients in memory."""
    found = []
    for more in ({}, {"offload_gradients": "disk", "offload_weights": "disk"}):
        plan = ParallelPlan(offload="disk", offload_delay=True, offload_folder=str(tmp_path), **more)
        engine = engine_of(DEEP, seed=4, plan=plan, precision="bf16")
        engine.optimizer.warm_up = 2
        found.append([engine.step(DEEP.batch(8, np.random.default_rng(n))).loss for n in range(5)])
        pool = engine.params.places.state
        assert pool.used <= pool.size
    assert found[0] == found[1]


def test_the_file_holds_what_was_asked_for(tmp_path):
    """Three numbers of state, one of gradients in fp32, a half-precision weight of every layer."""
    plan = ParallelPlan(offload="disk", offload_gradients="disk", offload_weights="disk", offload_folder=str(tmp_path))
    engine, _ = trained(DEEP, plan, 3, steps=1, precision="bf16")
    params = engine.params
    whole = sum(p.numel() for p in params.parameters.values())
    inside = sum(params.coming[name].numel() for name in params.coming)
    assert inside == sum(p.numel() for block in blocks_of(engine.model) for p in block.parameters())
    pages = 4096 * (4 * len(params.parameters) + len(params.coming))
    assert 16 * whole + 2 * inside <= params.places.state.used <= 16 * whole + 2 * inside + pages
    assert params.places.state is params.places.sums is params.places.weights


@pytest.mark.parametrize("trial", range(3))
def test_layers_read_from_a_disk_in_any_order(trial, tmp_path):
    """What arrives is what was last written, read ahead or not."""
    draw = random.Random(seed := random.randrange(10**6))
    torch.manual_seed(seed)
    shapes = [[(draw.randrange(1, 90), draw.randrange(1, 90)) for _ in range(draw.randrange(1, 5))] for _ in range(5)]
    pool = DiskPool(tmp_path, sum(DiskPool.bytes_of(each, torch.bfloat16) for each in shapes))
    if pool.direct is None:
        pytest.skip(f"the file system of {tmp_path} refuses direct I/O")
    layers = [[pool.zeros(shape, torch.bfloat16) for shape in each] for each in shapes]
    source = FromDisk(layers, pool, pool.direct)
    for _ in range(4):
        for tensor in (t for layer in layers for t in layer):
            tensor.copy_(torch.randn(tensor.shape))
        source.forget()
        for _ in range(8):
            layer = draw.randrange(5)
            found = source.arrived(layer)
            for ahead in draw.sample(range(5), draw.randrange(2)):
                if ahead != layer:
                    source.begin(ahead)
            assert all(torch.equal(a, b.view(-1)) for a, b in zip(source.arrived(layer), layers[layer], strict=True))
            del found


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"offload": "cpu", "offload_gradients": "disk", "offload_folder": "x"}, "use --plan.offload disk"),
        ({"offload_weights": "cpu"}, "use --plan.offload cpu"),
        ({"offload": "cpu", "offload_weights": "disk"}, "needs a folder"),
        ({"offload": "cpu", "offload_weights": "cpu", "remat": "rotor"}, "use --plan.remat full"),
        ({"offload": "cpu", "offload_weights": "cpu", "offload_tiles": 2}, "leave one out"),
        ({"offload": "cpu", "offload_weights": "cpu", "shard": 2}, "use --plan.zero 3"),
    ],
)
def test_plans_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        ParallelPlan(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"offload": "cpu"},
        {"offload": "cpu", "offload_weights": "cpu"},
        {"offload": "disk"},
        {"offload": "disk", "offload_gradients": "disk", "offload_weights": "disk"},
    ],
)
def test_what_is_held_is_what_is_predicted(fields, tmp_path):
    """Bytes of the tensors that an engine keeps outside of its device, beside `--dry-run`'s; each begins on a page of its own."""
    plan = ParallelPlan(**fields, offload_folder=str(tmp_path) if "disk" in fields.values() else "")
    engine, _ = trained(DEEP, plan, 3, steps=1, precision="bf16")
    params = engine.params
    graph = describe(DEEP.spec, batch=4, seq=8, dtype="bfloat16")
    host = Distribution(Spread(graph, plan, 2, 2), offloads=True).host(gpu=False)
    pool, leaving = params.places.state, params._leaving
    pages = 4096 * 5 * len(params.parameters)
    sums = [t for memory in leaving._kept._memory for t in memory.values()]
    arrived = list(leaving._landings.values())
    on_disk = plan.offload == "disk"
    held = 0 if on_disk else sum(p.numel() * (4 + 8) for p in params.parameters.values())
    assert host.disk <= (pool.used if on_disk else 0) <= host.disk + pages
    if not on_disk:
        assert host.state == held
    if plan.offload_gradients == "cpu":
        assert host.gradients == sum(t.numel() * t.itemsize for t in [*sums, *arrived])
    else:
        assert not arrived and params.places.sums is pool
    if plan.offload_weights == "cpu":
        assert host.weights == sum(t.numel() * t.itemsize for t in params.coming.values())
    if plan.offload_weights == "disk":
        buffers = [*params.layers.source.free, *(buffer for buffer, _ in params.layers.source.reading.values())]
        assert host.weights <= sum(len(buffer.map) for buffer in buffers) <= host.weights + 2 * 4096 * 12


@pytest.mark.slow
def test_layers_that_are_compiled_one_by_one(tmp_path):
    """In fp64 they compute what uncompiled ones in memory do."""
    away = ParallelPlan(offload="disk", offload_weights="disk", offload_folder=str(tmp_path))
    found = trained(DEEP, away, 5, steps=2, precision="fp64", compile=True)[1]
    assert found == pytest.approx(trained(DEEP, ParallelPlan(), 5, steps=2, precision="fp64")[1], rel=1e-9)
