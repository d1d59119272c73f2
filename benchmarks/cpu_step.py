"""Tokens a second of one training step on this CPU: Luban's step beside a plain compiled PyTorch model.

    python benchmarks/cpu_step.py [--rounds 5] [--steps 5] [--recipe luban_pretrain_cpu] [--optimizer adamw]

The plain model is what a practitioner writes in an afternoon: the same shape (its own code, SDPA, no document
boundaries), bf16 autocast over fp32 weights, fused AdamW, gradient clipping, torch.compile. Both train on the
same random tokens and take turns, so that a busy machine slows both; medians over all steps are printed. Luban's
step does more: document boundaries, a loss divided by the count of targets, NaN checks, deterministic algorithms.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from plain_model import Plain
from torch import nn

import luban.recipes
from luban.core.config import from_dict, load_toml, override
from luban.data.batch import Batch
from luban.models.config import resolve_spec
from luban.models.spec import ModelSpec
from luban.parallel.device import keep_freed_memory, set_determinism
from luban.train.recipe import Recipe
from luban.train.run import make_engine
from luban.train.start import Start

VOCABULARY = 4096
CPU = torch.device("cpu")


def plain_step(spec: ModelSpec, seq_len: int) -> Callable[[Batch], None]:
    mixer, feedforward = spec.last.mixer, spec.last.feedforward
    module = Plain(
        vocabulary=VOCABULARY,
        width=spec.width,
        layers=len(spec.layers),
        heads=mixer.heads,
        kv_heads=mixer.key_heads(),
        inner=feedforward.width,
        seq=seq_len,
        qk_norm=mixer.qk_norm is not None,
    )
    compiled = torch.compile(module, dynamic=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def step(batch: Batch) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets))
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def luban_step(recipe: Recipe, spec: ModelSpec) -> Callable[[Batch], None]:
    engine = make_engine(replace(recipe, train=replace(recipe.train, compile=True)), Start(spec=spec), CPU)
    return engine.step


def random_batch(rows: int, seq_len: int, draw: np.random.Generator) -> Batch:
    """Random tokens in documents of 200 tokens on average."""
    tokens = draw.integers(0, VOCABULARY, (rows, seq_len + 1))
    documents = (draw.random((rows, seq_len)) < 1 / 200).cumsum(axis=1).astype(np.int32)
    starts = np.where(np.diff(documents, axis=1, prepend=-1) != 0, np.arange(seq_len), 0)
    positions = (np.arange(seq_len) - np.maximum.accumulate(starts, axis=1)).astype(np.int32)
    return Batch(
        tokens=tokens[:, :-1].copy(),
        targets=tokens[:, 1:].copy(),
        documents=documents,
        positions=positions,
        loss_mask=np.ones((rows, seq_len), dtype=bool),
    )


class Side:
    """One of the two in a process of its own, so that neither sees the other's settings."""

    def __init__(self, name: str, recipe: Recipe):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(name, recipe, theirs), daemon=True)
        self.process.start()

    def turn(self, steps: int) -> list[float]:
        """Seconds of each of these steps, taken while the other side waits."""
        self.pipe.send(steps)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send(0)
        self.process.join()


def serve(name: str, recipe: Recipe, pipe: Connection) -> None:
    """Take steps when told how many, until told none."""
    train, spec = recipe.train, resolve_spec(recipe.model.given, VOCABULARY)
    if name == "luban":
        set_determinism(None, CPU)
        keep_freed_memory(CPU)
        step = luban_step(recipe, spec)
    else:
        step = plain_step(spec, train.seq_len)
    draw = np.random.default_rng(0)
    while steps := pipe.recv():
        times = []
        for _ in range(steps):
            batch = random_batch(train.batch_size, train.seq_len, draw)
            began = time.perf_counter()
            step(batch)
            times.append(time.perf_counter() - began)
        pipe.send(times)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5, help="turns of each")
    arguments.add_argument("--steps", type=int, default=5, help="steps a turn")
    arguments.add_argument("--recipe", default="luban_pretrain_cpu")
    arguments.add_argument("--optimizer", default="adamw", help="of Luban's step; the plain one has AdamW")
    args: SimpleNamespace = arguments.parse_args()
    data = load_toml(Path(luban.recipes.__file__).parent / f"{args.recipe}.toml")
    recipe = from_dict(Recipe, override(data, [("optim.type", args.optimizer)]))
    sides = {name: Side(name, recipe) for name in ("plain", "luban")}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        for name, side in sides.items():
            found = side.turn(args.steps if turn else 2)
            times[name] += found if turn else []  # the first turn compiles
    for side in sides.values():
        side.close()
    train = recipe.train
    tokens = train.batch_size * train.seq_len
    for name, values in times.items():
        median = statistics.median(values)
        low, high = min(values), max(values)
        print(
            f"{name:6} {tokens / median:8.0f} tokens/s  median {median * 1e3:.0f} ms  ({low * 1e3:.0f}-{high * 1e3:.0f})"
        )
    ratio = statistics.median(times["plain"]) / statistics.median(times["luban"])
    print(
        f"luban / plain: {ratio:.2f}×  ({platform.processor() or platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__})"
    )


if __name__ == "__main__":
    main()
