"""Small decoders over bytes, for benchmarks that compare ways to train one model: text, batches, a run, its held-out loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luban.core.plan import ParallelPlan
from luban.data.batch import Batch
from luban.models.build import build_model
from luban.models.spec import ModelSpec, uniform
from luban.nn.embedding import shrink_gradient
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.base import Objective
from luban.objectives.causal import Causal
from luban.optim.base import OptimizerConfig
from luban.parallel.apply import Execution, apply
from luban.parallel.engine import TrainEngine

BYTES = 256
HELDOUT = 0.1  # share of the text


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the model and its batches are."""

    width: int = 64
    layers: int = 4
    heads: int = 4
    tokens: int = 64  # of a row
    batch: int = 16  # rows a step
    windows: int = 128  # held-out rows


SMALL = Size()
GPU = Size(width=512, layers=12, heads=8, tokens=512, batch=64, windows=256)


def spec_of(size: Size, **changes: Any) -> ModelSpec:
    """A decoder of this size; `changes` as `luban.models.spec.uniform` takes them."""
    fields: dict[str, Any] = {
        "mixer": Grouped(heads=size.heads),
        "feedforward": SwiGLU(width=size.width * 8 // 3),
        "layers": size.layers,
    }
    return uniform(vocab_size=BYTES, width=size.width, context=size.tokens, **{**fields, **changes})


def read_text(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(training bytes, held-out bytes) of a file, uint8: its last tenth is held out."""
    text = np.frombuffer(file.read_bytes(), dtype=np.uint8)
    cut = int(len(text) * (1 - HELDOUT))
    return text[:cut], text[cut:]


def rows(text: np.ndarray, starts: np.ndarray, tokens: int) -> Batch:
    """Rows of `tokens` bytes at these places, one document each."""
    cut = text[starts[:, None] + np.arange(tokens + 1)].astype(np.int64)
    here = np.broadcast_to(np.arange(tokens, dtype=np.int32), (len(starts), tokens))
    zeros = np.zeros_like(here)
    return Batch(
        tokens=cut[:, :-1],
        targets=cut[:, 1:],
        loss_mask=np.ones_like(here, dtype=bool),
        documents=zeros,
        positions=here,
    )


def batches(text: np.ndarray, size: Size, seed: int) -> Iterator[Batch]:
    """Rows at random places, without end."""
    draw = np.random.default_rng(seed)
    while True:
        yield rows(text, draw.integers(0, len(text) - size.tokens - 1, size.batch), size.tokens)


def make_engine(
    spec: ModelSpec,
    optimizer: OptimizerConfig,
    *,
    device: str,
    seed: int,
    objective: Objective | None = None,
    clip: float = 1.0,
    embedding_gradient: float = 1.0,
) -> TrainEngine:
    """The model ready to train: fp32 on a CPU, bf16 over fp32 masters on a GPU."""
    objective = objective or Causal()
    with torch.device("meta"):
        model = build_model(spec, device="meta")
    if embedding_gradient < 1:
        shrink_gradient(model, embedding_gradient)
    on_gpu = torch.device(device).type == "cuda"
    how = Execution(device=torch.device(device), precision="bf16" if on_gpu else "fp32", clip=clip, compile=on_gpu)
    measured = objective.measured()
    evaluation = measured.loss(model) if measured != objective else None
    return apply(objective.loss(model), ParallelPlan(), optimizer, execution=how, init=seed, evaluation=evaluation)


def heldout(engine: TrainEngine, text: np.ndarray, size: Size) -> float:
    """Bits a byte over rows spread evenly."""
    starts = np.linspace(0, len(text) - size.tokens - 1, size.windows).astype(np.int64)
    total, count = 0.0, 0
    for part in np.array_split(starts, max(len(starts) // size.batch, 1)):
        loss, targets, _ = engine.evaluate(rows(text, part, size.tokens))
        total, count = total + loss, count + targets
    return total / count / math.log(2)


def clock(device: str) -> float:
    """Seconds: of this process's CPU time where that is what computes, so that other programs don't count."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def train(
    engine: TrainEngine, given: Iterator[Batch], steps: int, factor: Callable[[int, int], float]
) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) of so many steps; `factor(step, steps)` is on the peak learning rate."""
    losses, norms = [], []
    for step in range(steps):
        result = engine.step(next(given), factor(step, steps))
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return losses, norms


def sized(size: Size, **changes: int | None) -> Size:
    """The size with the fields that a command line gave."""
    return replace(size, **{name: value for name, value in changes.items() if value})
