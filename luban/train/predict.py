"""What a run will need before it starts: memory, time, FLOPs, energy; and what would make it fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt
from typing import Any

import torch

from luban.core.errors import UnsupportedError
from luban.core.opgraph import OpGraph
from luban.core.plan import REMATS, Remat
from luban.core.units import bytes_, count, milliseconds, seconds
from luban.data.batch import Batch
from luban.kernels import gated
from luban.kernels.limits import fits_float8_swiglu
from luban.models.build import build_model
from luban.models.describe import describe
from luban.models.spec import ModelSpec
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.position.base import PositionShape
from luban.nn.roles import Role, roles_of
from luban.parallel.device import compiler_missing
from luban.parallel.memory_limits import free_memory, resident_memory
from luban.parallel.precision import COMPUTE
from luban.planner.memory import MemoryPrediction, Setting, predict_memory
from luban.planner.step_time import StepTime, predict_step, update_time
from luban.train.device_rates import Machine, contention, rates
from luban.train.recipe import Recipe
from luban.train.trace_memory import trace_memory, trace_time

COMPILER = 250_000_000  # bytes that torch.compile leaves in the process: 150 to 350 MB found (torch 2.13, one graph)
LIBRARY = 0.5  # of what an uncompiled step passes through: what kernels and freed blocks keep of it (0.5 to 0.9 found)
SAMPLED = 64  # rows of a batch that predictions look at, at most
RESERVED = 0.03  # of a GPU's free memory that its allocator loses between blocks


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run, predicted."""

    parameters: int  # of the model
    memory: MemoryPrediction  # at the peak of a step
    free: int  # bytes free on the device now
    held: int  # bytes of main memory that this process held before
    machine: Machine
    tokens_per_step: int
    steps: int  # of the whole run
    model_flops: float  # of one step, as utilisation counts them
    precision: str
    step: StepTime
    budget: float = 0.0  # seconds that the run is limited to (0: none)
    compiled: bool = False  # by torch.compile
    doubts: tuple[str, ...] = ()  # why figures may be off

    @property
    def seconds(self) -> float:
        """Of the whole run, compilation and validation apart."""
        return min(self.step.total * self.steps, self.budget or float("inf"))

    @property
    def utilisation(self) -> float | None:
        """Share of the accelerator's peak, where it is in the table."""
        peak = self.machine.peak_flops(self.precision)
        return None if peak is None else self.model_flops / self.step.total / peak

    @property
    def process(self) -> int:
        """Main memory that the process will hold at its peak when it trains on the CPU."""
        return self.held + self.memory.total + self.beside

    @property
    def beside(self) -> int:
        """Main memory that a step on the CPU leaves behind without using it."""
        return COMPILER if self.compiled else int(LIBRARY * (self.memory.activations + self.memory.transient))

    def figures(self) -> dict[str, Any]:
        """For a run's manifest."""
        peak, row = self.machine.peak_flops(self.precision), self.machine.accelerator
        found: dict[str, Any] = {
            "predicted_memory_bytes": self.memory.total,
            "predicted_step_seconds": self.step.total,
            "model_flops_per_step": self.model_flops,
            "predicted_process_bytes": self.process,
        }
        if self.doubts:
            found["prediction_doubts"] = list(self.doubts)
        return found | ({"peak_flops": peak, "accelerator_watts": row.power} if peak and row else {})

    def summary(self) -> str:
        """One line, as training begins."""
        return (
            f"{count(self.parameters)} parameters on {self.machine.name} in {self.precision}; predicted: memory "
            f"{bytes_(self.memory.total)} of {bytes_(self.free)} free, a step in {milliseconds(self.step.total)}, "
            f"{count(self.tokens_per_step / self.step.total)} tokens/s" + "".join(f"; {doubt}" for doubt in self.doubts)
        )

    def lines(self) -> list[str]:
        """For the person who asked."""
        memory, row = self.memory, self.machine.accelerator
        steps = min(self.steps, int(self.seconds / self.step.total) + 1)
        share = "" if self.utilisation is None else f", {self.utilisation:.1%} of the accelerator's peak"
        rows = [
            f"model   {count(self.parameters)} parameters on {self.machine.name}, {self.precision}",
            f"memory  {bytes_(memory.total)} at the peak of a step; {bytes_(self.free)} are free",
            f"        parameters {bytes_(memory.parameters)}, optimizer {bytes_(memory.optimizer)}, gradients "
            f"{bytes_(memory.gradients)}, activations {bytes_(memory.activations)}, passing {bytes_(memory.transient)}",
            f"step    {milliseconds(self.step.total)}: {self.step}",
            f"speed   {count(self.tokens_per_step / self.step.total)} tokens/s, "
            f"{self.model_flops / self.step.total / 1e12:.3g} TFLOP/s of the model{share}",
            f"run     {steps:,} steps, {count(float(steps * self.tokens_per_step))} tokens, "
            f"{steps * self.model_flops:.3g} FLOPs: about {seconds(self.seconds)}, compilation and validation apart",
        ]
        if row is not None:
            rows.append(
                f"cost    {self.seconds / 3600:.3g} accelerator-hours, at most "
                f"{row.power * self.seconds / 3.6e6:.3g} kWh ({row.power:g} W)"
            )
        return rows + [f"doubt   {doubt}" for doubt in self.doubts]


def predict(recipe: Recipe, spec: ModelSpec, device: torch.device, sample: Callable[[int], Batch]) -> Prediction:
    """Predict a run without allocating its model; where the device is in no table, small measurements take a moment.

    Args:
        sample: `sample(n)` is n rows of those that the run will read.

    Raises:
        UnsupportedError: an attention was asked for by name that can't serve this run.
    """
    held = resident_memory()  # before anything is measured
    train, machine, (shapes, roles) = recipe.train, Machine.of(device), _parameters(spec)
    graph = _micro_batch(recipe, spec, sample(1))
    compiled = runs_compiled(recipe, device)
    setting = setting_of(recipe, spec, device)
    busy = contention(device)
    found = rates(
        machine, device, train.precision, spec, graph, setting, documents=spec.body.causal, kernel=train.kernel
    )
    flops = recipe.optim.update_flops(shapes, roles)
    if compiled or device.type != "cpu":
        step = predict_step(graph, setting, found, micro_batches=train.accumulate, update_flops=flops)
    else:
        rows = sample(min(graph.batch, SAMPLED))
        update = update_time(graph, setting, found, micro_batches=train.accumulate, flops=flops)
        step = StepTime(
            products=0.0,
            attention=0.0,
            elementwise=0.0,
            update=update,
            whole=train.accumulate * trace_time(recipe, spec, rows),
        )
    memory = _memory(recipe, spec, device, sample)
    return Prediction(
        parameters=graph.parameters,
        memory=memory,
        free=free_memory(device),
        held=held,
        machine=machine,
        tokens_per_step=train.batch_size * train.seq_len,
        steps=train.steps,
        model_flops=graph.model_flops * train.accumulate,
        precision=train.precision,
        step=step,
        budget=train.budget_seconds,
        compiled=compiled,
        doubts=tuple(_doubts(spec, device, compiled, busy)),
    )


def runs_compiled(recipe: Recipe, device: torch.device) -> bool:
    """Whether the step will be compiled: wanted, and possible."""
    return recipe.train.compile and compiler_missing(device) is None


def _memory(recipe: Recipe, spec: ModelSpec, device: torch.device, sample: Callable[[int], Batch]) -> MemoryPrediction:
    row, footprint = sample(1), None
    if device.type == "cpu" and not runs_compiled(recipe, device):
        footprint = trace_memory(recipe, spec, row)
    return predict_memory(_micro_batch(recipe, spec, row), setting_of(recipe, spec, device), footprint)


def _micro_batch(recipe: Recipe, spec: ModelSpec, row: Batch) -> OpGraph:
    """What the model does to one, whose rows are like this one: an encoder–decoder's have a length on either side."""
    rows = recipe.train.batch_size // recipe.train.accumulate
    return describe(spec, batch=rows, seq=recipe.train.seq_len, target=row.tokens.shape[1])


def _doubts(spec: ModelSpec, device: torch.device, compiled: bool, busy: float | None) -> Iterator[str]:
    """What makes figures less sure than they look."""
    if not spec.body.fixed_shapes:
        yield "a recurrent body's memory and time hang on where its documents end: both may be several times these"
    if device.type != "cpu" and not compiled:
        yield "figures are those of a compiled step (--train.compile true); uncompiled it takes more memory and time"
    if busy is not None:
        yield f"rates were measured on a busy machine, with {busy:.0%} of its threads' time: alone it will be faster"


@lru_cache(maxsize=8)
def _parameters(spec: ModelSpec) -> tuple[dict[str, tuple[int, ...]], dict[str, Role]]:
    """Shapes and roles by name."""
    model = build_model(spec, device="meta")
    return {name: tuple(p.shape) for name, p in model.named_parameters()}, roles_of(model)


def setting_of(recipe: Recipe, spec: ModelSpec, device: torch.device) -> Setting:
    """What of the trainer memory and time depend on."""
    train, fused = recipe.train, device.type == "cuda"
    written = runs_compiled(recipe, device) and train.precision == "bf16"
    masters = train.weights == "fp32" and train.precision not in ("fp32", "fp64")
    widened = not fused and masters and train.accumulate == 1
    attention = "fused" if fused else "written" if written else "wide"
    shapes, roles = _parameters(spec)
    networks = [layer.feedforward for layer in (*spec.layers, *spec.encoder)]
    again = fused and all(isinstance(network, SwiGLU) and not network.bias for network in networks)
    return Setting(
        half=train.precision not in ("fp32", "fp64"),
        masters=masters,
        accumulate=train.accumulate > 1,
        remat=recipe.plan.remat,
        fused=fused,
        inner_kept=not again,
        activation_fused=again and _fuses_activation(train.precision, spec),
        attention=attention,
        masks=_mask_planes(spec),
        optimizer=recipe.optim.state_bytes(shapes, roles),
        workspace=recipe.optim.workspace_bytes(shapes, roles, widened=widened),
    )


def _fuses_activation(precision: str, spec: ModelSpec) -> bool:
    """Whether a GPU computes SwiGLU inside the matmuls around it, or in 8 bits between them."""
    widths = {layer.feedforward.width for layer in (*spec.layers, *spec.encoder)}
    if precision == "fp8":
        return all(fits_float8_swiglu(spec.width, inner) for inner in widths)
    return all(gated.serves("cuda", COMPUTE[precision], COMPUTE[precision], spec.width, inner) for inner in widths)


def _mask_planes(spec: ModelSpec) -> int:
    """Squares of queries and keys that are written out for a row, where attention is not fused: one for each group of
    layers with like masks, or one a head."""
    planes = 0
    for group in {(layer.position, layer.mixer.attention(spec.width)) for layer in spec.layers}:
        position, shape = group
        if shape is None:
            continue
        with torch.device("meta"):
            at = PositionShape(width=spec.width, heads=shape.heads, head_dim=shape.head_dim, context=spec.context)
            biased = (position or spec.position).build(at).biased
        planes += shape.heads if biased or (shape.layout is not None and shape.layout.by_head) else 1
    return planes


def require_memory(
    recipe: Recipe, spec: ModelSpec, device: torch.device, prediction: Prediction, sample: Callable[[int], Batch]
) -> None:
    """Raise UnsupportedError, naming settings that would make it fit, when the run needs more than is free."""
    if device.type == "cuda":
        available = prediction.free * (1 - RESERVED)
    elif prediction.compiled:
        available = prediction.free - COMPILER
    else:
        available = prediction.free / (1 + LIBRARY)
    if prediction.memory.total <= available:
        return
    other = _Alternatives(recipe, spec, device, available, sample)
    remedies = "; ".join([*other.smaller_batches(), *other.rematerialisations()])
    raise UnsupportedError(
        f"training would need {prediction.memory}, and {bytes_(prediction.free)} are free, "
        f"{bytes_(max(available, 0))} of them for a step: {remedies or 'choose a smaller model'}"
    )


class _Alternatives:
    """What a run that doesn't fit into `available` bytes would need otherwise."""

    def __init__(
        self, recipe: Recipe, spec: ModelSpec, device: torch.device, available: float, sample: Callable[[int], Batch]
    ):
        self.recipe, self.spec, self.device, self.available, self.sample = recipe, spec, device, available, sample

    def memory(self, remat: Remat | None = None, **train: object) -> MemoryPrediction:
        """With these fields of `train` and the plan changed."""
        recipe = replace(
            self.recipe,
            train=replace(self.recipe.train, **train),
            plan=replace(self.recipe.plan, remat=remat or self.recipe.plan.remat),
        )
        return _memory(recipe, self.spec, self.device, self.sample)

    def smaller_batches(self) -> list[str]:
        """The fewest micro-batches, and the largest batch without more of them, that fit."""
        batch, accumulate = self.recipe.train.batch_size, self.recipe.train.accumulate
        remedies = []
        small = [n for n in range(1, isqrt(batch) + 1) if batch % n == 0]
        finer = sorted(n for n in {*small, *(batch // n for n in small)} if n > accumulate)
        first = bisect_left(finer, True, key=lambda n: self.memory(accumulate=n).total <= self.available)
        if first < len(finer):
            needed = bytes_(self.memory(accumulate=finer[first]).total)
            remedies.append(f"--train.accumulate {finer[first]} would need {needed}")
        if largest := self.largest_batch():
            remedies.append(f"--train.batch_size {largest} is the largest that fits")
        return remedies

    def largest_batch(self, remat: Remat | None = None, **train: object) -> int:
        """The largest batch size below the wanted one that fits, with these fields changed; 0: none does."""
        accumulate = self.recipe.train.accumulate
        fits, fails = 0, self.recipe.train.batch_size // accumulate  # rows of a micro-batch
        while fails - fits > 1:
            middle = (fits + fails) // 2
            enough = self.memory(remat, batch_size=middle * accumulate, **train).total <= self.available
            fits, fails = (middle, fails) if enough else (fits, middle)
        return fits * accumulate

    def rematerialisations(self) -> list[str]:
        """What each stronger policy would need, or the largest batch with it where that is too much."""
        remedies = []
        for policy in REMATS[REMATS.index(self.recipe.plan.remat) + 1 :]:
            needed = self.memory(policy).total  # type: ignore[arg-type]
            if needed <= self.available:
                remedies.append(f"--plan.remat {policy} would need {bytes_(needed)}")
            elif largest := self.largest_batch(policy):  # type: ignore[arg-type]
                remedies.append(f"--plan.remat {policy} --train.batch_size {largest} is the largest that fits with it")
        return remedies
