"""A mixture of experts beside the dense model of equal FLOPs, and what the load-balancing loss does.

    python benchmarks/mixture_of_experts.py --device cuda --jobs 9 --out experts    # a GPU
    python benchmarks/mixture_of_experts.py --out experts                           # a CPU, smaller
    python benchmarks/mixture_of_experts.py --quick --out experts                   # a minute: shows that it runs

Small decoders are trained on bytes of text for the same number of steps. In the dense one every layer has a SwiGLU network of
inner width I; in the mixtures every second layer (GLaM's pattern) has X experts of inner width I/2, of which a token reads two:
the same matmul FLOPs but for the router's. One mixture is trained with the balance loss, one without. Held-out bits a byte,
mean and standard error over seeds; the load of the busiest expert over the mean, of the worst layer, averaged over the last tenth
of the steps.

Checked: with the balance loss max/mean load is at most 1.5, without it at least 3, and the mixture with it has fewer bits a byte than the
dense model. The text is that of `length_extrapolation.py`: Python sources, or --data. Writes OUT.json; exits 1 where a
check fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from length_extrapolation import rate, read_text

from luban import describe
from luban.core.plan import ParallelPlan
from luban.data.batch import Batch
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.moe.layer import MixtureOfExperts
from luban.nn.moe.top_k import TopK
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.apply import Execution, apply
from luban.parallel.engine import TrainEngine

BYTES = 256
LIMITS = {"balanced": 1.5, "unbalanced": 3.0}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The experiment's size."""

    width: int = 256
    layers: int = 6
    heads: int = 8
    inner: int = 768  # I, of the dense network
    experts: int = 16  # X
    tokens: int = 256  # of a row
    batch: int = 64  # rows a step
    steps: int = 3000
    lr: float = 2e-3
    warmup: int = 100
    seeds: int = 3
    windows: int = 1024  # held-out rows
    points: int = 12  # held-out measurements


SMALL = Setting(
    width=64,
    layers=4,
    heads=4,
    inner=192,
    tokens=64,
    batch=32,
    steps=600,
    lr=3e-3,
    warmup=50,
    seeds=1,
    windows=128,
    points=6,
)
QUICK = Setting(
    width=64, layers=2, heads=4, inner=192, experts=8, tokens=64, batch=16, steps=60, seeds=1, windows=64, points=3
)


def specs(setting: Setting) -> dict[str, ModelSpec]:
    """Name → model."""
    dense = uniform(
        vocab_size=BYTES,
        width=setting.width,
        layers=setting.layers,
        context=setting.tokens,
        mixer=Grouped(heads=setting.heads),
        feedforward=SwiGLU(width=setting.inner),
    )

    def mixture(balance: float) -> ModelSpec:
        moe = MixtureOfExperts(width=setting.inner // 2, experts=setting.experts, router=TopK(balance=balance))
        changed = replace(dense.layers[0], feedforward=moe)
        return replace(dense, layers=tuple(changed if i % 2 else layer for i, layer in enumerate(dense.layers)))

    return {"dense": dense, "balanced": mixture(0.01), "unbalanced": mixture(0.0)}


def rows(text: np.ndarray, starts: np.ndarray, tokens: int) -> Batch:
    """Rows of `tokens` bytes at these places, one document each."""
    cut = text[starts[:, None] + np.arange(tokens + 1)].astype(np.int64)
    here = np.broadcast_to(np.arange(tokens, dtype=np.int32), (len(starts), tokens))
    return Batch(
        tokens=cut[:, :-1],
        targets=cut[:, 1:],
        loss_mask=np.ones_like(here, dtype=bool),
        documents=np.zeros_like(here),
        positions=here,
    )


def heldout(engine: TrainEngine, text: np.ndarray, setting: Setting) -> float:
    """Bits a byte over rows spread evenly."""
    starts = np.linspace(0, len(text) - setting.tokens - 1, setting.windows).astype(np.int64)
    total, count = 0.0, 0
    for part in np.array_split(starts, max(len(starts) // setting.batch, 1)):
        loss, targets, _ = engine.evaluate(rows(text, part, setting.tokens))
        total, count = total + loss, count + targets
    return total / count / float(np.log(2))


def train(name: str, seed: int, setting: Setting, device: str, texts: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    """One run's curve of held-out bits a byte, load of experts and time."""
    spec, (text, other) = specs(setting)[name], texts
    torch.set_num_threads(1)
    with torch.device("meta"):
        model = spec.body.build(spec)
    how = Execution(device=torch.device(device), precision="bf16" if device == "cuda" else "fp32")
    engine = apply(Causal().loss(model), ParallelPlan(), AdamW(lr=setting.lr), execution=how, init=seed)
    generator, curve, loads = np.random.default_rng(seed), [], []
    began = time.perf_counter()
    for step in range(setting.steps):
        starts = generator.integers(0, len(text) - setting.tokens - 1, setting.batch)
        factor = rate(step, warmup=setting.warmup, steps=setting.steps)
        result = engine.step(rows(text, starts, setting.tokens), factor)
        loads.append(result.metrics.get("expert_load_max", 1.0))
        if (step + 1) % (setting.steps // setting.points) == 0:
            curve.append((step + 1, heldout(engine, other, setting)))
    last = loads[-max(setting.steps // 10, 1) :]
    graph = describe(spec, batch=1, seq=setting.tokens)
    return {
        "model": name,
        "seed": seed,
        "curve": curve,
        "load": statistics.mean(last),
        "parameters": graph.parameters,
        "active": graph.active_parameters,
        "flops_a_token": graph.model_flops / setting.tokens,
        "seconds": time.perf_counter() - began,
    }


def check(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What isn't as it must be."""
    bits = {name: statistics.mean(run["curve"][-1][1] for run in runs) for name, runs in found.items()}
    load = {name: [run["load"] for run in runs] for name, runs in found.items()}
    problems = []
    if max(load["balanced"]) > LIMITS["balanced"]:
        problems.append(
            f"with the balance loss max/mean load is {max(load['balanced']):.2f}, above {LIMITS['balanced']}"
        )
    if min(load["unbalanced"]) < LIMITS["unbalanced"]:
        problems.append(f"without it max/mean load is {min(load['unbalanced']):.2f}, below {LIMITS['unbalanced']}")
    if bits["balanced"] >= bits["dense"]:
        problems.append(f"the mixture has {bits['balanced']:.3f} bits a byte, the dense model {bits['dense']:.3f}")
    return problems


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    args = parser.parse_args()
    setting = QUICK if args.quick else Setting() if args.device == "cuda" else SMALL
    texts = read_text(args.data)
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = [
            pool.submit(train, name, seed, setting, args.device, texts)
            for seed in range(setting.seeds)
            for name in specs(setting)
        ]
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in specs(setting)}
        for run in runs:
            result = run.result()
            found[result["model"]].append(result)
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(f"{device}, torch {torch.__version__}, Python {platform.python_version()}, {setting.steps} steps")
    print(
        f"{'model':<12}{'parameters':>12}{'active':>12}{'MFLOPs/token':>14}{'bits/byte':>11}{'±':>7}{'max/mean load':>15}{'s':>7}"
    )
    for name, results in found.items():
        bits = [run["curve"][-1][1] for run in results]
        error = statistics.stdev(bits) / len(bits) ** 0.5 if len(bits) > 1 else 0.0
        first, seconds = results[0], statistics.mean(run["seconds"] for run in results)
        loads = " ".join(f"{run['load']:.2f}" for run in results)
        print(
            f"{name:<12}{first['parameters']:>12,}{first['active']:>12,}{first['flops_a_token'] / 1e6:>14.1f}"
            f"{statistics.mean(bits):>11.4f}{error:>7.4f}{loads:>15}{seconds:>7.0f}"
        )
    args.out.with_suffix(".json").write_text(
        json.dumps({"setting": asdict(setting), "device": device, "runs": found}, indent=1)
    )
    print("bits/byte at step", *(f"{step:>7}" for step, _ in found["dense"][0]["curve"]))
    for name, results in found.items():
        means = [statistics.mean(run["curve"][i][1] for run in results) for i in range(len(results[0]["curve"]))]
        print(f"{name:<17}", *(f"{mean:>7.3f}" for mean in means))
    problems = [] if args.quick else check(found)
    for problem in problems:
        print(problem, file=sys.stderr)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
