"""Runs of LLaMA shapes on random tokens: weights drawn on the device, steps timed beside what the planner predicts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luban.core.plan import ParallelPlan
from luban.core.seeding import derive
from luban.data.batch import Batch
from luban.models.build import build_model, state_of
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.apply import Execution, apply
from luban.parallel.engine import TrainEngine
from luban.train.predict import predict
from luban.train.recipe import Recipe, TrainConfig

WARM_UP = 3  # steps that aren't timed


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaMA shape."""

    width: int = 2048
    inner: int = 5632
    layers: int = 22
    vocab: int = 32_000
    heads: int = 16
    kv_heads: int = 4
    seq: int = 2048

    def spec(self) -> ModelSpec:
        """The model."""
        return uniform(
            vocab_size=self.vocab,
            width=self.width,
            layers=self.layers,
            context=self.seq,
            mixer=Grouped(heads=self.heads, kv_heads=self.kv_heads),
            feedforward=SwiGLU(width=self.inner),
        )

    def batch(self, rows: int) -> Batch:
        """Random tokens, a document a row."""
        tokens = np.random.default_rng(0).integers(0, self.vocab, (rows, self.seq + 1))
        at = np.broadcast_to(np.arange(self.seq, dtype=np.int32), (rows, self.seq))
        ones = np.ones((rows, self.seq), dtype=bool)
        return Batch(
            tokens=tokens[:, :-1], targets=tokens[:, 1:], loss_mask=ones, documents=np.zeros_like(at), positions=at
        )


LLAMA = Shape()  # 1.1B parameters
TINY = Shape(width=128, inner=352, layers=6, vocab=512, heads=4, kv_heads=2, seq=128)


class DrawnWeights(Mapping[str, Tensor]):
    """Weights of a model by name, drawn on the device when they are asked for: matrices normal with deviation 0.02, the
    rest ones. The initialisation of training draws on the CPU, so that weights don't depend on the device: 20 s for 10⁹."""

    def __init__(self, spec: ModelSpec, device: torch.device):
        self.like, self.device = state_of(build_model(spec, device="meta")), device

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.like[name]
        if tensor.dim() < 2:
            return torch.ones(tensor.shape, device=self.device)
        generator = torch.Generator(self.device).manual_seed(derive(0, name))
        return torch.empty(tensor.shape, device=self.device).normal_(std=0.02, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


def here() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def predicted(shape: Shape, plan: ParallelPlan, rows: int) -> dict[str, float]:
    """Seconds and bytes of a step as `luban pretrain --dry-run` predicts them; for pofo those of Rotor's schedule."""
    device = here()
    train = TrainConfig(precision="bf16", compile=device.type == "cuda", batch_size=rows, seq_len=shape.seq)
    found = predict(Recipe(optim=AdamW(), train=train, plan=plan), shape.spec(), device, shape.batch)
    return {"predicted_seconds": found.step.total, "predicted_bytes": found.memory.total}


def engine_of(shape: Shape, plan: ParallelPlan) -> TrainEngine:
    """A model in bf16 with fp32 masters, compiled on a GPU."""
    device, spec = here(), shape.spec()
    execution = Execution(device=device, precision="bf16", compile=device.type == "cuda")
    loss = Causal().loss(build_model(spec, device="meta"))
    return apply(loss, plan, AdamW(), execution=execution, init=DrawnWeights(spec, device))


def timed(engine: TrainEngine, shape: Shape, rows: int, steps: int) -> dict[str, Any]:
    """Median seconds of a step and the most bytes of the device, after the first steps; the first step's own."""
    cuda, batch = torch.cuda.is_available(), shape.batch(rows)
    times, losses, first_peak = [], [], 0
    for step in range(WARM_UP + steps):
        if step == WARM_UP and cuda:
            first_peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        losses.append(engine.step(batch).loss)
        times.append(time.perf_counter() - began)
    engine.optimizer.finish()
    seconds = statistics.median(times[WARM_UP:])
    return {
        "step_seconds": seconds,
        "tokens_per_second": rows * shape.seq / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
        "first_step_seconds": times[0],
        "first_peak_bytes": first_peak,
        "loss": losses[-1],
        "rows": rows,
        "steps": steps,
    }
