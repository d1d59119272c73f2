"""ZeRO-Offload and ZeRO-Infinity: Adam on the host beside memory bandwidth, steps with and without offloading, the largest model that fits.

    python benchmarks/offload.py adam [--numbers 100000000]
    python benchmarks/offload.py step [--layers 22] [--rows 16] [--folder DIR] [--steps 8] [--tiny]
    python benchmarks/offload.py fit --cap 20 [--tiny]

adam: bytes a second of torch's fused kernel (28 a number: weight, gradient and two moments read, three written) beside a copy's.
step: tokens a second of the LLaMA shape of 1.1B parameters in bf16, kept on the GPU, offloaded to the host, with delayed updates, and to
a disk. fit: under a cap on GPU memory (GB), the most layers of width 4,096 with which a step runs, with and without offloading.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from luban.core.plan import ParallelPlan
from luban.core.units import bytes_, count
from luban.data.batch import Batch
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.apply import Execution, apply
from luban.parallel.engine import TrainEngine

MOVED = 7 * 4  # bytes of a number that an update reads and writes


def adam(numbers: int) -> None:
    """Bandwidth of the update and of a copy."""
    tensors = [torch.randn(numbers) for _ in range(4)]
    weight, gradient, first, second = tensors
    second.abs_()
    step = torch.ones(())
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}

    def update() -> None:
        torch._fused_adamw_(
            [weight], [gradient], [first], [second], [], [step], amsgrad=False, maximize=False, **options
        )

    other = torch.empty_like(weight)
    rates = {"fused Adam": MOVED * numbers / _best(update), "copy": 8 * numbers / _best(lambda: other.copy_(weight))}
    for name, rate in rates.items():
        print(f"{name:<12} {bytes_(rate)}/s on {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"a copy is {rates['copy'] / rates['fused Adam']:.2f} times as fast (1.5 would call for a kernel of our own)")


def _best(work, rounds: int = 5) -> float:
    times = []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def engine_of(layers: int, width: int, plan: ParallelPlan, remat: str = "selective") -> TrainEngine:
    """A LLaMA shape in bf16 with fp32 masters."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = uniform(
        vocab_size=32_000 if width > 512 else 512,
        width=width,
        layers=layers,
        context=2048,
        mixer=Grouped(heads=max(width // 128, 1), kv_heads=max(width // 512, 1)),
        feedforward=SwiGLU(width=width * 11 // 4),
    )
    execution = Execution(device=device, precision="bf16", compile=device.type == "cuda")
    plan = ParallelPlan(**{**vars(plan), "remat": remat})
    return apply(Causal().loss(build_model(spec, device="meta")), plan, AdamW(), execution=execution)


def batch_of(rows: int, tokens: int, words: int) -> Batch:
    """Random tokens."""
    drawn = np.random.default_rng(0).integers(0, words, (rows, tokens + 1))
    at = np.broadcast_to(np.arange(tokens, dtype=np.int32), (rows, tokens))
    ones = np.ones((rows, tokens), dtype=bool)
    return Batch(tokens=drawn[:, :-1], targets=drawn[:, 1:], loss_mask=ones, documents=np.zeros_like(at), positions=at)


def steps(args: argparse.Namespace) -> None:
    """Tokens a second of each place."""
    width, tokens = (128, 64) if args.tiny else (2048, 2048)
    layers, rows = (3, 2) if args.tiny else (args.layers, args.rows)
    batch = batch_of(rows, tokens, 512)
    plans = {
        "device": ParallelPlan(),
        "host": ParallelPlan(offload="cpu"),
        "host, delayed": ParallelPlan(offload="cpu", offload_delay=True),
        "disk": ParallelPlan(offload="disk", offload_folder=str(args.folder)),
    }
    for name, plan in plans.items():
        engine = engine_of(layers, width, plan)
        if plan.offload_delay:
            engine.optimizer.warm_up = 1
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(3 + args.steps):
            began = time.perf_counter()
            engine.step(batch)
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times[3:])
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        print(
            f"{name:<14} {1e3 * seconds:9.1f} ms  {rows * tokens / seconds:10,.0f} tokens/s  {bytes_(peak)}", flush=True
        )
        engine.optimizer.finish()
        del engine


def fit(args: argparse.Namespace) -> None:
    """The most layers under a cap."""
    width, tokens = (64, 32) if args.tiny else (4096, 2048)
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(args.cap * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    for name, plan in {"device": ParallelPlan(), "host": ParallelPlan(offload="cpu")}.items():
        good, layers = (0, 0), 1
        while layers <= (2 if args.tiny else 512):
            try:
                engine = engine_of(layers, width, plan, remat="full")
                engine.step(batch_of(1, tokens, 512))
                good = layers, sum(p.numel() for p in engine.params.parameters.values())
                del engine
            except torch.OutOfMemoryError:
                break
            finally:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            layers = layers + max(layers // 4, 1)
        print(f"{name:<14} {good[0]} layers, {count(good[1])} parameters under {args.cap:g} GB", flush=True)


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("adam", "step", "fit"))
    parser.add_argument("--numbers", type=int, default=100_000_000)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("offload"))
    parser.add_argument("--cap", type=float, default=20.0)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    {"adam": lambda: adam(args.numbers), "step": lambda: steps(args), "fit": lambda: fit(args)}[args.what]()


if __name__ == "__main__":
    main()
