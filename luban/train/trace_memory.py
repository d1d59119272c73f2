"""Memory and time of an uncompiled step before it runs, for `luban.train.predict`.

What an uncompiled step saves, and how long it takes, depends on every operation that the model's code calls. So the code
itself is run: for memory on fake tensors, which have shapes and no data; for time really, on models of one and of two
layers.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luban.adapters.base import AdapterConfig
from luban.core.errors import ConfigError
from luban.core.plan import SCHEDULES, ParallelPlan
from luban.data.batch import Batch
from luban.kernels.limits import CHUNK_ELEMENTS
from luban.models.build import build_model
from luban.models.describe import describe
from luban.models.spec import ModelSpec, changed
from luban.models.stack import blocks_of, stacks_of
from luban.objectives.base import Objective
from luban.parallel.precision import COMPUTE
from luban.parallel.remat import remat_policy
from luban.parallel.remat.scheduled import schedule_stacks
from luban.planner.memory import TracedMemory
from luban.train.recipe import Recipe

PROBE = 10**10  # FLOPs of a timed forward and backward, at most, unless one row takes more
TRACED = 2**14  # tokens on fake tensors, at most, or four chunks of logits; larger micro-batches are extrapolated
ROUNDS = 3  # of every timing after one to warm up; the best counts


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:  # there is no data to ask: as many as there can be
            out = args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.int64)
        else:
            out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


def trace_memory(recipe: Recipe, spec: ModelSpec, row: Batch) -> TracedMemory | None:
    """Bytes that an uncompiled micro-batch on the CPU allocates, without buffers inside of kernels.

    Args:
        row: one of the rows that the run will read.

    Returns:
        None where that depends on the data, as for a recurrent body, which cuts rows where documents end.
    """
    train = recipe.train
    arrays = tuple(
        (name, array.shape[1:], torch.from_numpy(np.empty(0, array.dtype)).dtype)
        for name, array in row.arrays().items()
    )
    trace = partial(_trace, spec, recipe.adapter, recipe.objective, COMPUTE[train.precision], recipe.plan, arrays)
    rows = train.batch_size // train.accumulate
    most = 2 * max(1, max(TRACED, 4 * CHUNK_ELEMENTS // spec.vocab_size) // (2 * train.seq_len))
    if rows <= most:
        return trace(rows)
    less, more = trace(most // 2), trace(most)
    if less is None or more is None:
        return None
    further = (rows - most) / (most - most // 2)
    return TracedMemory(
        saved=int(more.saved + further * (more.saved - less.saved)),
        peak=int(more.peak + further * (more.peak - less.peak)),
    )


@lru_cache(maxsize=64)  # a refused run asks for many batch sizes, all extrapolated from a few
def _trace(
    spec: ModelSpec,
    adapter: AdapterConfig | None,
    objective: Objective,
    dtype: torch.dtype,
    plan: ParallelPlan,
    arrays: tuple[tuple[str, tuple[int, ...], torch.dtype], ...],
    rows: int,
) -> TracedMemory | None:
    """The same of `rows` rows, without extrapolation.

    Args:
        arrays: name, shape of a row and dtype of everything that the loss reads.
    """
    module = build_model(spec, device="meta")
    if adapter is not None:
        adapter.adapt(module)
    loss_module = objective.loss(module)
    with FakeTensorMode(), _Live() as live:
        _give_memory(module, dtype)
        _use_remat(module, plan)
        batch = {name: torch.empty((rows, *shape), dtype=kind) for name, shape, kind in arrays}
        before = live.now
        try:
            loss = loss_module(batch).sum
            saved = live.now - before
            loss.backward()
        except DataDependentOutputException:
            return None
        return TracedMemory(saved=saved, peak=live.peak - before)


def _give_memory(module: nn.Module, dtype: torch.dtype) -> None:
    """Move a module from the meta device to the CPU; shared parameters stay shared."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = made.setdefault(id(parameter), _empty_like(parameter, dtype))
                part._parameters[name] = new
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _empty_like(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)


def trace_time(recipe: Recipe, spec: ModelSpec, rows: Batch) -> float:
    """Seconds that an uncompiled micro-batch takes on this CPU, forward and backward.

    A model of one layer and one of two are timed on a few rows; each further layer takes the difference, and time is
    proportional to rows. What a schedule of all layers computes again isn't counted.

    Args:
        rows: of the run, which are timed or only some of them.
    """
    wanted = recipe.train.batch_size // recipe.train.accumulate
    seq = recipe.train.seq_len
    each = describe(_shallow(spec, 2), batch=1, seq=seq).training_flops
    used = max(1, min(wanted, len(rows.tokens), PROBE // max(each, 1)))
    batch = {name: torch.tensor(array[:used]) for name, array in rows.arrays().items()}
    one, two = (_seconds(recipe, _shallow(spec, layers), batch) for layers in (1, 2))
    return (one + (_depth(spec) - 1) * max(two - one, 0.0)) * wanted / used


def _depth(spec: ModelSpec) -> int:
    return len(spec.layers) if spec.body.stacked else spec.body.layers  # type: ignore[attr-defined]


def _shallow(spec: ModelSpec, layers: int) -> ModelSpec:
    """The model with so many layers."""
    if spec.body.stacked:
        return changed(spec, layers=layers, encoder_layers=layers if spec.body.two_sided else None)
    return replace(spec, body=replace(spec.body, layers=layers))  # type: ignore[call-arg]


def _use_remat(module: nn.Module, plan: ParallelPlan) -> None:
    for block in blocks_of(module):
        block.use_remat(remat_policy(plan.layer_policy, block))
    if plan.remat in SCHEDULES:
        schedule_stacks(stacks_of(module), plan.remat, plan.remat_budget, timed=False)


def _seconds(recipe: Recipe, spec: ModelSpec, batch: dict[str, Tensor]) -> float:
    module = build_model(spec, seed=0).to(COMPUTE[recipe.train.precision])
    if recipe.adapter is not None:
        try:
            recipe.adapter.adapt(module)
        except ConfigError:  # it names layers that the shallow model lacks, after freezing those that there are
            module.requires_grad_(True)
    if recipe.plan.remat not in SCHEDULES:  # those need all layers
        _use_remat(module, recipe.plan)
    return best_of(_pass(recipe.objective.loss(module), batch))


def _pass(loss: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    def once() -> None:
        loss.zero_grad()
        loss(batch).sum.backward()

    return once


def best_of(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds of the fastest of a few runs after one to warm up."""
    times = []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])
