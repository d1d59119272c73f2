"""Gathers what the planner needs to predict a run: its operations, the trainer's settings and the device's rates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import torch

from luban.core.errors import UnsupportedError
from luban.core.opgraph import OpGraph
from luban.core.units import bytes_
from luban.data.batch import Batch
from luban.kernels import gated
from luban.kernels.limits import fits_float8_swiglu
from luban.models.build import build_model
from luban.models.describe import describe
from luban.models.spec import ModelSpec
from luban.nn.position.base import PositionShape
from luban.nn.roles import Role, roles_of
from luban.parallel.device import compiler_missing
from luban.parallel.memory_limits import free_memory, resident_memory
from luban.parallel.precision import COMPUTE
from luban.planner.fitting import BatchPlan, Fitting
from luban.planner.memory import MemoryPrediction, StepSettings, predict_memory
from luban.planner.prediction import Prediction
from luban.planner.step_time import StepTime, predict_step, update_time
from luban.train.device_rates import busy_fraction, device_rates, machine_of
from luban.train.recipe import Recipe
from luban.train.trace_memory import trace_memory, trace_time

SAMPLED = 64  # rows of a batch that predictions look at, at most


def predict(recipe: Recipe, spec: ModelSpec, device: torch.device, sample: Callable[[int], Batch]) -> Prediction:
    """Predict a run without allocating its model; where the device isn't in the table, its rates are measured, which
    takes a moment.

    Args:
        sample: `sample(n)` is n rows of those that the run will read.

    Raises:
        UnsupportedError: an attention was asked for by name that can't serve this run.
    """
    resident = resident_memory()  # before anything is measured
    recipe = _of_one_process(recipe)
    train, machine, (shapes, roles) = recipe.train, machine_of(device), _parameters(spec)
    graph = _micro_batch(recipe, spec, sample(1))
    compiled = runs_compiled(recipe, device)
    settings = step_settings(recipe, spec, device)
    busy = busy_fraction(device)
    rates = device_rates(
        machine, device, train.precision, spec, graph, settings, documents=spec.body.causal, kernel=train.kernel
    )
    flops = recipe.optim.update_flops(shapes, roles)
    if compiled or device.type != "cpu":
        step = predict_step(graph, settings, rates, micro_batches=train.accumulate, update_flops=flops)
    else:
        rows = sample(min(graph.batch, SAMPLED))
        step = StepTime(
            matmul_seconds=0.0,
            attention_seconds=0.0,
            elementwise_seconds=0.0,
            update_seconds=update_time(graph, settings, rates, micro_batches=train.accumulate, flops=flops),
            measured_seconds=train.accumulate * trace_time(recipe, spec, rows),
        )
    return Prediction(
        parameters=graph.parameters,
        memory=_memory(recipe, spec, device, sample),
        free=free_memory(device),
        resident=resident,
        machine=machine,
        on_cpu=device.type == "cpu",
        tokens_per_step=train.batch_size * train.seq_len,
        steps=train.steps,
        model_flops=graph.model_flops * train.accumulate,
        precision=train.precision,
        step=step,
        budget=train.budget_seconds,
        compiled=compiled,
        doubts=tuple(_doubts(spec, device, compiled, busy)),
    ).spread(recipe.plan.processes, recipe.plan.shard)


def _of_one_process(recipe: Recipe) -> Recipe:
    """The recipe with the rows that each process reads."""
    return replace(recipe, train=replace(recipe.train, batch_size=recipe.train.batch_size // recipe.plan.processes))


def require_memory(
    recipe: Recipe, spec: ModelSpec, device: torch.device, prediction: Prediction, sample: Callable[[int], Batch]
) -> None:
    """Raise UnsupportedError, naming settings that would make it fit, when the run needs more than is free."""
    if prediction.memory.total <= prediction.available:
        return
    recipe = _of_one_process(recipe)

    def memory(plan: BatchPlan) -> int:
        train = replace(recipe.train, batch_size=plan.batch_size, accumulate=plan.accumulate)
        changed = replace(recipe, train=train, plan=replace(recipe.plan, remat=plan.remat))
        return _memory(changed, spec, device, sample).total

    plan = BatchPlan(recipe.train.batch_size, recipe.train.accumulate, recipe.plan.remat)
    remedies = "; ".join(Fitting(plan, memory, prediction.available).remedies())
    raise UnsupportedError(
        f"training would need {prediction.memory}, and {bytes_(prediction.free)} are free, "
        f"{bytes_(prediction.available)} of them for a step: {remedies or 'choose a smaller model'}"
    )


def runs_compiled(recipe: Recipe, device: torch.device) -> bool:
    """Whether the step will be compiled: asked for, and possible."""
    return recipe.train.compile and compiler_missing(device) is None


def step_settings(recipe: Recipe, spec: ModelSpec, device: torch.device) -> StepSettings:
    """What memory and time depend on beside the operations."""
    train, on_gpu = recipe.train, device.type == "cuda"
    chunked = runs_compiled(recipe, device) and train.precision == "bf16"
    masters = train.weights == "fp32" and train.precision not in ("fp32", "fp64")
    shapes, roles = _parameters(spec)
    recomputed = on_gpu and all(layer.feedforward.recomputed for layer in (*spec.layers, *spec.encoder))
    return StepSettings(
        master_weights=masters,
        accumulates=train.accumulate > 1,
        remat=recipe.plan.remat,
        gpu_kernels=on_gpu,
        saves_activation=not recomputed,
        activation_in_matmul=recomputed and _fuses_activation(train.precision, spec),
        attention="fused" if on_gpu else "chunked" if chunked else "fp32",
        dense_masks=_dense_masks(spec),
        optimizer_bytes=recipe.optim.state_bytes(shapes, roles),
        update_bytes=recipe.optim.workspace_bytes(
            shapes, roles, widened=masters and not on_gpu and train.accumulate == 1
        ),
    )


def _memory(recipe: Recipe, spec: ModelSpec, device: torch.device, sample: Callable[[int], Batch]) -> MemoryPrediction:
    row, traced = sample(1), None
    if device.type == "cpu" and not runs_compiled(recipe, device):
        traced = trace_memory(recipe, spec, row)
    return predict_memory(_micro_batch(recipe, spec, row), step_settings(recipe, spec, device), traced)


def _micro_batch(recipe: Recipe, spec: ModelSpec, row: Batch) -> OpGraph:
    """The operations of one micro-batch, whose rows are like this one: an encoder–decoder's have two lengths."""
    rows, dtype = recipe.train.batch_size // recipe.train.accumulate, COMPUTE[recipe.train.precision]
    name = str(dtype).removeprefix("torch.")
    return describe(spec, batch=rows, seq=recipe.train.seq_len, target=row.tokens.shape[1], dtype=name)


def _doubts(spec: ModelSpec, device: torch.device, compiled: bool, busy: float | None) -> Iterator[str]:
    """What makes the figures less certain than they look."""
    if not spec.body.fixed_shapes:
        yield (
            "a recurrent body's memory and time depend on where its documents end: both may be several times what "
            "is predicted"
        )
    if device.type != "cpu" and not compiled:
        yield (
            "the figures are those of a compiled step (--train.compile true); an uncompiled one takes more memory "
            "and time"
        )
    if busy is not None:
        yield f"rates were measured while the machine was busy, with {busy:.0%} of its CPU time: alone it is faster"


@lru_cache(maxsize=8)
def _parameters(spec: ModelSpec) -> tuple[dict[str, tuple[int, ...]], dict[str, Role]]:
    """Shapes and roles by name."""
    model = build_model(spec, device="meta")
    return {name: tuple(p.shape) for name, p in model.named_parameters()}, roles_of(model)


def _fuses_activation(precision: str, spec: ModelSpec) -> bool:
    """Whether a GPU computes SwiGLU inside the matmuls around it, or in fp8 between them."""
    widths = {layer.feedforward.width for layer in (*spec.layers, *spec.encoder)}
    if precision == "fp8":
        return all(fits_float8_swiglu(spec.width, inner) for inner in widths)
    return all(gated.serves("cuda", COMPUTE[precision], COMPUTE[precision], spec.width, inner) for inner in widths)


def _dense_masks(spec: ModelSpec) -> int:
    """Masks of T × T a row that unfused attention makes: one for each group of layers with like masks, or one a head
    where heads have biases or layouts of their own."""
    masks = 0
    for position, shape in {(layer.position, layer.mixer.attention(spec.width)) for layer in spec.layers}:
        if shape is None:
            continue
        with torch.device("meta"):
            at = PositionShape(width=spec.width, heads=shape.heads, head_dim=shape.head_dim, context=spec.context)
            biased = (position or spec.position).build(at).biased
        masks += shape.heads if biased or (shape.layout is not None and shape.layout.by_head) else 1
    return masks
