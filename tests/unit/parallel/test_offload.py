"""Training state on the host and on a disk: the same training, other places."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from drawn import drawn
from families import FAMILIES, engine_of
from safetensors.torch import load_file
from torch import nn

from luban.checkpoint.storage import write_safetensors
from luban.core.errors import ConfigError, TrainingError, UnsupportedError
from luban.core.plan import ParallelPlan
from luban.nn.linear import Linear
from luban.nn.roles import HIDDEN, roles_of
from luban.optim.adamw import AdamW
from luban.optim.base import Optimizer, Update
from luban.optim.muon import Muon
from luban.parallel.offload import pools, tiles
from luban.parallel.offload.delayed import DelayedOptimizer
from luban.parallel.offload.host_params import HostParams
from luban.parallel.offload.pools import DiskPool, HostPool, disk_bandwidth
from luban.parallel.offload.streamed import StreamedGroups
from luban.parallel.offload.tiles import tiled_weights, use_tiles
from luban.planner.offload import efficiency, state_intensity

FAMILY = FAMILIES["decoder"]


def trained(plan: ParallelPlan, seed: int, steps: int = 4, **settings):
    engine = engine_of(FAMILY, seed=seed, plan=plan, accumulate=2, **settings)
    results = [engine.step(FAMILY.batch(8, np.random.default_rng([seed, n]))) for n in range(steps)]
    return engine, [(r.loss, r.grad_norm) for r in results]


@pytest.mark.parametrize(("offload", "precision"), drawn(product(["cpu", "disk"], ["fp32", "bf16", "fp64"]), 2))
def test_training_is_that_of_one_pool(offload, precision, tmp_path):
    """Bit by bit: losses, norms, weights, moments; and what is saved is taken up by a run without offloading, and back."""
    seed = random.randrange(10**6)
    plan = ParallelPlan(offload=offload, offload_folder=str(tmp_path))
    (plain, losses), (away, found) = (trained(p, seed, precision=precision) for p in (ParallelPlan(), plan))
    assert found == losses
    ours, theirs = away.state_dict(), plain.state_dict()
    for part in ("model", "optimizer"):
        assert ours[part].keys() == theirs[part].keys()
        for name, tensor in theirs[part].items():
            assert torch.equal(ours[part][name], tensor), name
    assert not os.listdir(tmp_path)  # the file has no name, so nothing stays
    other, _ = trained(plan, seed + 1, steps=1, precision=precision)
    other.load_state_dict(theirs)
    batch = FAMILY.batch(8, np.random.default_rng(99))
    assert other.step(batch).loss == plain.step(batch).loss
    for name, tensor in plain.state_dict()["model"].items():
        assert torch.equal(other.state_dict()["model"][name], tensor)


def test_the_device_holds_no_masters_and_no_gradients():
    engine, _ = trained(ParallelPlan(offload="cpu"), 1, steps=1, precision="bf16")
    params = engine.params
    assert isinstance(params, HostParams)
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in params.working.values())
    masters = {p.data_ptr() for p in params.parameters.values()}
    assert not masters & {p.data_ptr() for p in params.working.values()}
    seen = []
    for name, parameter in params.working.items():
        hook = lambda p, name=name: seen.append(sum(q.grad is not None for q in params.working.values()))  # noqa: E731
        parameter.register_post_accumulate_grad_hook(hook)
    engine.step(FAMILY.batch(8, np.random.default_rng(0)))
    assert len(seen) == 2 * len(params.working) and max(seen) == 0  # each had left before the next one was complete


def reference_delayed(weights: torch.Tensor, targets: list[torch.Tensor], warm_up: int) -> torch.Tensor:
    """Adam on ½|w − target|² whose gradients are taken one update late after the warm-up."""
    master = nn.Parameter(weights.clone())
    adam = torch.optim.AdamW([master], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    visible, late = master.detach().clone(), None
    for step, target in enumerate(targets):
        master.grad = visible - target
        before = master.detach().clone()
        adam.step()
        visible = master.detach().clone() if step < warm_up else before
        late = before
    del late
    return master.detach()


def test_delayed_updates_are_one_step_late():
    torch.manual_seed(random.randrange(10**6))
    weights, warm_up = torch.randn(6), 3
    targets = [torch.randn(6) for _ in range(9)]
    master = nn.Parameter(weights.clone())
    working = weights.clone()
    built = AdamW(lr=0.1, weight_decay=0.0).build({"w": master}, {"w": "norm"})
    optimizer = DelayedOptimizer(built, warm_up)
    for target in targets:
        gradient = working - target
        update = Update({master: gradient.clone()}, torch.ones(()), torch.ones((), dtype=torch.bool), {master: working})
        optimizer.step(1.0, update)
    optimizer.finish()
    torch.testing.assert_close(master.detach(), reference_delayed(weights, targets, warm_up))
    assert torch.equal(working, master.detach())
    again = DelayedOptimizer(AdamW(lr=0.1).build({"w": nn.Parameter(weights.clone())}, {"w": "norm"}), warm_up)
    again.load_state_dict(optimizer.state_dict())
    assert again.steps == len(targets)  # no second warm-up


def test_delayed_training_saves_and_goes_on():
    """After a save both runs go on from the same visible weights."""
    plan = ParallelPlan(offload="cpu", offload_delay=True)
    engine, losses = trained(plan, 5, steps=6)
    engine.optimizer.warm_up = 0
    for n in range(6, 9):
        engine.step(FAMILY.batch(8, np.random.default_rng([5, n])))
    state = {part: {k: v.clone() for k, v in tensors.items()} for part, tensors in engine.state_dict().items()}
    other, _ = trained(plan, 6, steps=1)
    other.optimizer.warm_up = 0
    other.load_state_dict(state)
    for n in range(9, 12):
        batch = FAMILY.batch(8, np.random.default_rng([5, n]))
        assert engine.step(batch).loss == other.step(batch).loss
    assert all(np.isfinite(loss) for loss, _ in losses)


def test_a_full_disk_is_met_before_the_first_step(tmp_path):
    with pytest.raises(
        UnsupportedError, match=r"has no space: offloading to it needs 1e\+06 TB|has no space|can't be used"
    ):
        DiskPool(tmp_path, 10**18)
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsupportedError, match="can't be used"):
        DiskPool(tmp_path / "file", 10)


def test_a_full_disk_leaves_a_run_as_it_was(tmp_path):
    """Files may not grow beyond 64 kB: training isn't begun, what was in the folder is untouched, nothing is added."""
    (tmp_path / "weights").write_bytes(b"kept")
    program = f"""
import resource
from pathlib import Path
from luban.core.errors import UnsupportedError
from luban.parallel.offload import pools
from luban.parallel.offload.pools import DiskPool, HostPool
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
try:
    DiskPool(Path({str(tmp_path)!r}), 2**20)
except UnsupportedError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "File too large" in found.stdout and "1.05 MB" in found.stdout
    assert os.listdir(tmp_path) == ["weights"] and (tmp_path / "weights").read_bytes() == b"kept"


@pytest.mark.parametrize("of", [lambda folder: DiskPool(folder, 2**22), disk_bandwidth])
def test_a_folder_that_can_not_be_used_is_named(tmp_path, of, monkeypatch):
    """Before anything else: a file in its place, and a disk that is full when space is taken. Nothing stays behind."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UnsupportedError, match=r"plan.offload_folder \S+/file can't be used \(File exists\)"):
        of(tmp_path / "file")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UnsupportedError, match=r"plan.offload_folder \S+/disk has no space: .* are free"):
        of(tmp_path / "disk")
    assert not os.listdir(tmp_path / "disk")


def adam_of(sizes: list[tuple[int, ...]], zeros: Callable[..., torch.Tensor]) -> tuple[Optimizer, list[nn.Parameter]]:
    """AdamW over parameters of these sizes whose weights and moments `zeros` makes, equal for equal seeds of torch."""
    parameters = {f"w{n}": nn.Parameter(zeros(size, torch.float32)) for n, size in enumerate(sizes)}
    for parameter in parameters.values():
        parameter.data.copy_(torch.randn(parameter.shape))
    optimizer = AdamW(lr=0.01).build(parameters, dict.fromkeys(parameters, "q"))
    for parameter, state in optimizer.algorithms[0].state.items():
        state.update(exp_avg=zeros(parameter.shape, torch.float32), exp_avg_sq=zeros(parameter.shape, torch.float32))
        state["step"] = torch.zeros(())
    return optimizer, list(parameters.values())


def updates(parameters: list[nn.Parameter], copies: list[torch.Tensor], draw: random.Random) -> Update:
    """Random gradients, of some parameters none."""
    gradients = {p: torch.randn(p.shape) for p in parameters if draw.random() < 0.8 or p is parameters[0]}
    scale = torch.tensor(draw.choice([1.0, 0.5]))
    return Update(gradients, scale, torch.tensor(draw.random() < 0.8), dict(zip(parameters, copies, strict=True)))


@pytest.mark.parametrize("trial", range(3))
def test_updates_in_pieces_by_direct_io_are_those_in_memory(trial, tmp_path):
    """Bit by bit, in weights, moments, counts and half-precision copies: matrices larger and smaller than pieces, bad steps."""
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    sizes = [(draw.randrange(1, 90), draw.randrange(1, 90)) for _ in range(draw.randrange(2, 7))] + [(5000,)]
    pool = DiskPool(tmp_path, 3 * DiskPool.bytes_of(sizes, torch.float32))
    if pool.direct is None:
        pytest.skip(f"the file system of {tmp_path} refuses direct I/O")
    runs = []
    for zeros in (pool.zeros, lambda size, dtype: torch.zeros(size, dtype=dtype)):
        torch.manual_seed(seed)
        optimizer, parameters = adam_of(sizes, zeros)
        if zeros == pool.zeros:
            optimizer.algorithms = [StreamedGroups(optimizer.algorithms[0], pool, numbers=1024)]
        copies, choices = [p.detach().bfloat16() for p in parameters], random.Random(seed)
        for _ in range(5):
            optimizer.step(0.7, updates(parameters, copies, choices))
        runs.append([*optimizer.state_dict().values(), *(p.detach() for p in parameters), *copies])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_disk_that_fails_in_an_update_is_named(tmp_path, monkeypatch):
    pool = DiskPool(tmp_path, 3 * DiskPool.bytes_of([(64, 64)], torch.float32))
    if pool.direct is None:
        pytest.skip(f"the file system of {tmp_path} refuses direct I/O")
    optimizer, parameters = adam_of([(64, 64)], pool.zeros)
    streamed = StreamedGroups(optimizer.algorithms[0], pool)
    address = parameters[0].data_ptr()

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwritev", broken)
    with pytest.raises(TrainingError, match=r"Input/output error.*go on from the last checkpoint"):
        gradients = {parameters[0]: torch.randn(64, 64)}
        streamed.step(1.0, Update(gradients, torch.ones(()), torch.tensor(True)))
    assert parameters[0].data_ptr() == address


def test_a_file_system_without_direct_io_is_used_through_its_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(errno.EINVAL, "Invalid argument")))
    seed = random.randrange(10**6)
    plan = ParallelPlan(offload="disk", offload_folder=str(tmp_path))
    (_, losses), (away, found) = (trained(p, seed, steps=2) for p in (ParallelPlan(), plan))
    assert found == losses and away.params.places.state.direct is None
    assert "refuses direct I/O (Invalid argument)" in capsys.readouterr().err


def test_tensors_of_a_file_keep_their_bits(tmp_path):
    shapes = [(3, 5), (), (1000,), (0,)]
    pool = DiskPool(tmp_path, DiskPool.bytes_of(shapes, torch.float32))
    tensors = [pool.zeros(shape, torch.float32) for shape in shapes]
    values = [torch.randn(shape) for shape in shapes]
    for tensor, value in zip(tensors, values, strict=True):
        assert not tensor.any()
        tensor.copy_(value)
    assert all(torch.equal(t, v) for t, v in zip(tensors, values, strict=True))
    assert pool.used <= pool.size


def test_tensors_of_host_memory_share_slabs_and_are_saved_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "SLAB", 2**14)
    shapes = [(random.randrange(1, 40), random.randrange(1, 40)) for _ in range(12)] + [(5000,), (0,), ()]
    pool = HostPool(pinned=False, size=DiskPool.bytes_of(shapes, torch.float32))
    tensors = {f"w{n}": pool.zeros(shape, torch.float32) for n, shape in enumerate(shapes)}
    values = {name: torch.randn(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert not tensor.any()
        tensor.copy_(values[name])
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) < len(shapes)
    write_safetensors(tensors, tmp_path / "state.safetensors")
    saved = load_file(tmp_path / "state.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in values.items())


@pytest.mark.parametrize("trial", range(4))
def test_a_linear_layer_in_tiles_is_the_whole_one(trial):
    """Outputs and all gradients, for more tiles than outputs and for frozen weights, too."""
    draw = random.Random(seed := random.randrange(10**6))
    torch.manual_seed(seed)
    inputs, outputs, pieces = (draw.randrange(1, top) for top in (30, 30, 40))
    bias = draw.random() < 0.5
    layers = [Linear(inputs, outputs, bias=bias).double() for _ in range(2)]
    for parameter in layers[0].parameters():
        nn.init.normal_(parameter)
    layers[1].load_state_dict(layers[0].state_dict())
    use_tiles(layers[1], pieces)
    frozen, results = draw.random() < 0.3, []
    x = torch.randn(2, draw.randrange(1, 9), inputs, dtype=torch.float64)
    towards = torch.randn(*x.shape[:2], outputs, dtype=torch.float64)
    for layer in layers:
        layer.weight.requires_grad_(not frozen)
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(towards)
        results.append([y.detach(), given.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    assert len(results[0]) == 2 + (not frozen) + (layers[0].bias is not None)
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)


def test_tiles_are_read_one_after_another(monkeypatch):
    """At most two are on the way or in use, in each direction every tile once."""
    layer, seen = Linear(8, 12, bias=False), []
    nn.init.normal_(layer.weight)
    use_tiles(layer, 4)
    read = tiles._read
    monkeypatch.setattr(tiles, "_read", lambda part, streams: seen.append(part.shape) or read(part, streams))
    layer(torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert seen == [(3, 8)] * 8


@pytest.mark.parametrize(
    ("offload", "remat"), drawn(product(["cpu", "disk"], ["none", "selective", "full", "rotor"]), 2)
)
def test_training_by_tiles_is_that_of_whole_matrices(offload, remat, tmp_path):
    family = replace(FAMILY, spec=replace(FAMILY.spec, layers=FAMILY.spec.layers[:1] * 5))
    found = []
    for plan in (
        ParallelPlan(),
        ParallelPlan(offload=offload, offload_folder=str(tmp_path), offload_tiles=3, remat=remat, remat_budget="70%"),
    ):
        engine = engine_of(family, seed=3, plan=plan, precision="fp64")
        results = [engine.step(family.batch(8, np.random.default_rng(n))) for n in range(3)]
        found.append([x for r in results for x in (r.loss, r.grad_norm)])
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert len(tiled_weights(engine.model)) == sum(
        role in HIDDEN for role in roles_of(engine.model).values()
    )  # every matrix inside of layers


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"offload_tiles": 2}, "use --plan.offload cpu"),
        ({"offload": "cpu", "offload_tiles": -1}, "number from 0"),
        ({"offload": "disk"}, "needs a folder"),
        ({"offload_delay": True}, "use --plan.offload cpu"),
        ({"offload": "cpu", "replicate": 4}, "use --plan.shard 2 --plan.replicate 2"),
        ({"offload": "cpu", "context": 2}, "use --plan.shard 2 --plan.context 1"),
        ({"offload": "cpu", "shard": 2, "offload_tiles": 2}, "goes with one process"),
        ({"offload": "disk", "offload_folder": "x", "shard": 2}, "offload disk .* use --plan.zero 2"),
        ({"offload": "cpu", "offload_delay": True, "shard": 2}, "offload_delay .* use --plan.zero 2"),
        ({"offload": "cpu", "pipeline": 2, "schedule": "zero_bubble"}, "use --plan.schedule 1f1b"),
    ],
)
def test_plans_that_make_no_sense_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        ParallelPlan(**fields)


def test_other_optimizers_are_refused():
    for optimizer in (Muon(), AdamW(moments="bf16")):
        with pytest.raises(ConfigError, match="Adam with fp32 moments"):
            engine_of(FAMILY, seed=0, plan=ParallelPlan(offload="cpu"), optimizer=optimizer)


def test_offloading_goes_with_schedules_of_rematerialisation():
    family = replace(FAMILY, spec=replace(FAMILY.spec, layers=FAMILY.spec.layers[:1] * 5))
    found = []
    for plan in (ParallelPlan(), ParallelPlan(offload="cpu", remat="rotor", remat_budget="60%")):
        engine = engine_of(family, seed=3, plan=plan, precision="fp64")
        found.append([engine.step(family.batch(8, np.random.default_rng(n))).loss for n in range(3)])
    assert found[0] == found[1]


def test_the_efficiency_model():
    """Rajbhandari et al. 2021, section 4.2: at 70 TFLOP/s the state of 2 × 1,024 tokens needs about 1.5 TB/s for 90%."""
    assert efficiency(state_intensity(2 * 1024), 1.5e12, 70e12) == pytest.approx(0.9, abs=0.02)
    assert efficiency(1.0, 1.0, 1.0) == 0.5
