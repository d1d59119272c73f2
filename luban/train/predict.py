"""Collects the planner's inputs for a run: operation graph, trainer settings and device rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from luban.adapters.base import AdapterConfig
from luban.core.errors import UnsupportedError
from luban.core.opgraph import TRAINING_FACTOR, OpGraph
from luban.core.plan import SCHEDULES
from luban.core.units import bytes_
from luban.data.batch import Batch
from luban.kernels import gated
from luban.kernels.limits import fits_float8_swiglu
from luban.models.build import build_model
from luban.models.describe import describe
from luban.models.spec import ModelSpec
from luban.nn.position.base import PositionShape
from luban.nn.roles import Role, roles_of
from luban.optim.base import hidden_matrices
from luban.parallel.device import compiler_missing
from luban.parallel.memory_limits import free_memory, resident_memory
from luban.parallel.offload.pools import disk_bandwidth
from luban.parallel.precision import COMPUTE
from luban.planner.distribution import Distribution
from luban.planner.fitting import BatchPlan, Fitting
from luban.planner.memory import MemoryPrediction, StepSettings, computed_again, predict_memory
from luban.planner.offload import LAYERS_HERE, HostMemory, efficiency, state_intensity
from luban.planner.prediction import Prediction
from luban.planner.step_time import Rates, StepTime, predict_step, update_time
from luban.planner.traffic import Spread
from luban.train.device_rates import busy_fraction, device_rates, machine_of
from luban.train.recipe import Recipe
from luban.train.trace_memory import trace_memory, trace_time

SAMPLED = 64  # maximum number of a batch's rows used for a prediction


def predict(recipe: Recipe, spec: ModelSpec, device: torch.device, sample: Callable[[int], Batch]) -> Prediction:
    """Predict a run without allocating its model. Rates of a device that isn't in accelerators.toml are measured, which
    takes about a second.

    Args:
        sample: `sample(n)` returns n rows of the run's training data.

    Raises:
        UnsupportedError: `train.kernel` doesn't support this run.
    """
    resident = resident_memory()  # before anything is measured
    recipe = _of_one_process(recipe)
    train, machine, (shapes, roles) = recipe.train, machine_of(device), trained_shapes(spec, recipe.adapter)
    graph = _micro_batch(recipe, spec, sample(1))
    compiled = runs_compiled(recipe, device)
    settings = step_settings(recipe, spec, device)
    memory = _memory(
        recipe, spec, device, sample
    )  # refuses too small a `plan.remat_budget` by traced bytes, where there are some
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
            measured_seconds=train.accumulate * trace_time(recipe, spec, rows) * _with_schedule(graph, settings),
        )
    distribution = _distribution(recipe, graph)
    prediction = Prediction(
        parameters=graph.parameters,
        active_parameters=graph.active_parameters,
        memory=memory,
        free_bytes=free_memory(device),
        resident_bytes=resident,
        machine=machine,
        on_cpu=device.type == "cpu",
        tokens_per_step=train.batch_size * train.seq_len,
        steps=train.steps,
        model_flops=graph.model_flops * train.accumulate,
        precision=train.precision,
        step=step,
        budget=train.budget_seconds,
        compiled=compiled,
        trained=settings.trained,
        caveats=(*_caveats(spec, device, compiled, busy), *_offload_caveat(recipe, rates)),
    ).over(distribution)
    return prediction if recipe.plan.offload == "none" else prediction.offloaded(_host(distribution, settings, device))


def _offload_caveat(recipe: Recipe, rates: Rates) -> Iterator[str]:
    """ZeRO-Infinity's model of how much of a step the device computes, at the measured bandwidth of the disk."""
    if recipe.plan.offload == "cpu":
        yield "the time of the update on the host and of messages to it isn't counted"
    if recipe.plan.offload == "disk":
        bandwidth = disk_bandwidth(Path(recipe.plan.offload_folder))
        share = efficiency(state_intensity(recipe.train.batch_size * recipe.train.seq_len), bandwidth, rates.matmul)
        yield (
            f"the time of the update on disk isn't counted: at {bytes_(bandwidth)}/s the device computes for {share:.0%} of a "
            "step, if nothing overlaps (ZeRO-Infinity's model)"
        )


def _with_schedule(graph: OpGraph, settings: StepSettings) -> float:
    """Time of a step under a schedule of rematerialisation relative to one without: a forward pass is a third of it."""
    return 1 + computed_again(graph, settings) / TRAINING_FACTOR if settings.remat in SCHEDULES else 1.0


def _distribution(recipe: Recipe, graph: OpGraph) -> Distribution:
    """The plan's processes; `recipe` is that of one of them, `graph` of its micro-batches."""
    gradients = max(graph.itemsize, 4)
    spread = Spread(graph, recipe.plan, recipe.train.accumulate, graph.itemsize, gradients)
    return Distribution(spread, offloads=recipe.plan.offload != "none")


def _host(distribution: Distribution, settings: StepSettings, device: torch.device) -> HostMemory:
    """What offloading takes outside of the device."""
    whole = distribution.spread.graph.parameters
    trained = 1.0 if settings.trained is None else settings.trained / whole
    return distribution.host(trained=trained, gpu=device.type == "cuda")


def _of_one_process(recipe: Recipe) -> Recipe:
    """The recipe with the rows that each process reads, in as many micro-batches as it works on."""
    train, plan = recipe.train, recipe.plan
    return replace(
        recipe,
        train=replace(
            train, batch_size=train.batch_size // plan.readers, accumulate=train.accumulate * plan.microbatches
        ),
    )


def require_memory(
    recipe: Recipe, spec: ModelSpec, device: torch.device, prediction: Prediction, sample: Callable[[int], Batch]
) -> None:
    """Raise UnsupportedError if the run needs more memory than is free; the message names settings that would fit."""
    if prediction.memory.total <= prediction.available_bytes:
        return
    recipe = _of_one_process(recipe)

    def memory(plan: BatchPlan) -> int:
        train = replace(recipe.train, batch_size=plan.batch_size, accumulate=plan.accumulate)
        changed = replace(recipe, train=train, plan=replace(recipe.plan, remat=plan.remat))
        whole = _memory(changed, spec, device, sample)
        distribution = _distribution(changed, _micro_batch(changed, spec, sample(1)))
        memory = distribution.memory(whole)
        if device.type == "cpu" and changed.plan.offload != "none":
            memory = memory.beside(_host(distribution, step_settings(changed, spec, device), device))
        return memory.total

    plan = BatchPlan(recipe.train.batch_size, recipe.train.accumulate, recipe.plan.remat)
    remedies = "; ".join(Fitting(plan, memory, prediction.available_bytes).remedies())
    raise UnsupportedError(
        f"training would need {prediction.memory}, and {bytes_(prediction.free_bytes)} are free, "
        f"{bytes_(prediction.available_bytes)} of them for a step: {remedies or 'choose a smaller model'}"
    )


def runs_compiled(recipe: Recipe, device: torch.device) -> bool:
    """True if the step will be compiled: requested and supported here."""
    return recipe.train.compile and compiler_missing(device) is None


def step_settings(recipe: Recipe, spec: ModelSpec, device: torch.device) -> StepSettings:
    """Trainer and device settings that memory and step time depend on."""
    train, on_gpu = recipe.train, device.type == "cuda"
    chunked = runs_compiled(recipe, device) and train.precision == "bf16"
    masters = train.weights == "fp32" and train.precision not in ("fp32", "fp64")
    shapes, roles = trained_shapes(spec, recipe.adapter)
    recomputed = on_gpu and all(layer.feedforward.recomputed for layer in (*spec.layers, *spec.encoder))
    return StepSettings(
        master_weights=masters,
        trained=None if recipe.adapter is None else sum(map(math.prod, shapes.values())),
        accumulates=train.accumulate > 1,
        remat=recipe.plan.remat,
        remat_budget=recipe.plan.remat_budget,
        remat_layer=recipe.plan.remat_layer,
        offloads=recipe.plan.offload != "none",
        host_parameters=sum(math.prod(shapes[name]) for name in hidden_matrices(roles) if name in shapes)
        if on_gpu and recipe.plan.offload_tiles
        else 0,
        layers_here=LAYERS_HERE if recipe.plan.offload_weights != "none" else 0,
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
    """The operations of one micro-batch. `row` gives the target length, which differs in an encoder–decoder."""
    rows, dtype = recipe.train.batch_size // recipe.train.accumulate, COMPUTE[recipe.train.precision]
    name = str(dtype).removeprefix("torch.")
    seq = recipe.train.seq_len if spec.body.two_sided else row.tokens.shape[1]
    return describe(spec, batch=rows, seq=seq, target=row.tokens.shape[1], dtype=name)


def _caveats(spec: ModelSpec, device: torch.device, compiled: bool, busy: float | None) -> Iterator[str]:
    """Reasons why the predictions may be wrong."""
    if not spec.body.fixed_shapes:
        yield (
            "a recurrent body's memory and time depend on where its documents end: both may be several times the "
            "prediction"
        )
    if device.type != "cpu" and not compiled:
        yield (
            "the prediction is for a compiled step (--train.compile true); an uncompiled one takes more memory and time"
        )
    if busy is not None:
        yield f"rates were measured on a busy machine, with {busy:.0%} of its CPU time; an idle machine is faster"


@lru_cache(maxsize=8)
def trained_shapes(
    spec: ModelSpec, adapter: AdapterConfig | None
) -> tuple[dict[str, tuple[int, ...]], dict[str, Role]]:
    """Shapes and roles by name, of the parameters that are trained."""
    model = build_model(spec, device="meta")
    if adapter is not None:
        adapter.adapt(model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    roles = roles_of(model)
    return shapes, {name: roles[name] for name in shapes}


def _fuses_activation(precision: str, spec: ModelSpec) -> bool:
    """True if a GPU fuses SwiGLU with the matmuls or, in fp8, with quantisation."""
    widths = {layer.feedforward.width for layer in (*spec.layers, *spec.encoder)}
    if precision == "fp8":
        return all(fits_float8_swiglu(spec.width, inner) for inner in widths)
    return all(gated.serves("cuda", COMPUTE[precision], COMPUTE[precision], spec.width, inner) for inner in widths)


def _dense_masks(spec: ModelSpec) -> int:
    """Number of masks (T × T per row) of unfused attention: one per group of layers that share a mask, or one per head if
    heads have their own biases or layouts."""
    masks = 0
    for position, shape in {(layer.position, layer.mixer.attention(spec.width)) for layer in spec.layers}:
        if shape is None:
            continue
        with torch.device("meta"):
            at = PositionShape(width=spec.width, heads=shape.heads, head_dim=shape.head_dim, context=spec.context)
            biased = (position or spec.position).build(at).biased
        masks += shape.heads if biased or (shape.layout is not None and shape.layout.by_head) else 1
    return masks
