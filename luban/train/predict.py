"""What a run will need before it starts: memory, tokens, FLOPs, time."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from luban.core.errors import UnsupportedError
from luban.core.units import bytes_, count, seconds
from luban.models.build import build_model
from luban.models.describe import describe
from luban.models.spec import ModelSpec
from luban.planner.memory import MemoryPrediction, predict_memory
from luban.train.device import free_memory
from luban.train.precision import COMPUTE
from luban.train.recipe import Recipe

MATMUL = 1024  # rows and columns of the timed matrix product
EFFICIENCY = 0.5  # share of the matrix product's rate that a whole training step reaches


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run, predicted."""

    parameters: int  # of the model
    memory: MemoryPrediction  # at the peak of a step
    free: int  # bytes free on the device now
    tokens: int  # read over the whole run
    flops: float  # of the whole run
    seconds: float | None = None  # of the whole run, where a rate was measured

    def lines(self) -> list[str]:
        """For the person who asked."""
        rows = [f"parameters  {count(self.parameters)}", f"memory      {self.memory}; {bytes_(self.free)} free",
                f"tokens      {count(self.tokens)}", f"FLOPs       {self.flops:.3g}"]  # fmt: skip
        return rows if self.seconds is None else [*rows, f"time        about {seconds(self.seconds)}"]


def predict(recipe: Recipe, spec: ModelSpec, device: torch.device, *, timed: bool = False) -> Prediction:
    """Predict a run without allocating its model; `timed` measures a matrix product to predict its time."""
    train = recipe.train
    memory = _memory(recipe, spec, train.accumulate)
    graph = describe(spec, batch=train.batch_size, seq=train.seq_len)
    flops = float(graph.training_flops) * train.steps
    length = flops / (EFFICIENCY * matmul_rate(device, COMPUTE[train.precision])) if timed else None
    if length is not None and train.budget_seconds:
        length = min(length, train.budget_seconds)
    return Prediction(parameters=graph.parameters, memory=memory, free=free_memory(device), flops=flops,
                      tokens=train.steps * train.batch_size * train.seq_len, seconds=length)  # fmt: skip


def _memory(recipe: Recipe, spec: ModelSpec, accumulate: int) -> MemoryPrediction:
    train = recipe.train
    shapes = {name: tuple(p.shape) for name, p in build_model(spec, device="meta").named_parameters()}
    graph = describe(spec, batch=train.batch_size // accumulate, seq=train.seq_len)
    return predict_memory(graph, vocab_size=spec.vocab_size, optimizer=recipe.optim.state_bytes(shapes),
                          half=train.precision != "fp32")  # fmt: skip


def require_memory(recipe: Recipe, spec: ModelSpec, prediction: Prediction) -> None:
    """Raise UnsupportedError, naming the setting that would make it fit, when the run needs more than is free."""
    if prediction.memory.total <= prediction.free:
        return
    batch = recipe.train.batch_size
    remedy = "choose a smaller model"
    for accumulate in (n for n in range(recipe.train.accumulate + 1, batch + 1) if batch % n == 0):
        memory = _memory(recipe, spec, accumulate)
        if memory.total <= prediction.free:
            remedy = f"--train.accumulate {accumulate} would need {bytes_(memory.total)}"
            break
    raise UnsupportedError(f"training would need {prediction.memory}, and {bytes_(prediction.free)} are free: {remedy}")


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on this machine, the best of a few."""
    a = torch.randn(MATMUL, MATMUL, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        _synchronize(device)
        began = time.perf_counter()
        a @ a
        _synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * MATMUL**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
