"""Step time and peak memory of every way of rematerialisation, on one GPU.

    python benchmarks/remat.py [--rows 16] [--steps 8] [--budgets 30% 50% 70%] [--out FILE.json] [--tiny]

The LLaMA shape of 1.1B parameters of gpu_step.py, bf16 with fp32 masters. Rotor and POFO run within each budget, a share of the
activations that saving everything takes. Every run has a process of its own. --tiny: a small model on whatever device there is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from luban.core.plan import SCHEDULES, ParallelPlan
from luban.core.units import bytes_
from luban.data.batch import Batch
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.apply import Execution, apply

SHAPE = {"width": 2048, "inner": 5632, "layers": 22, "vocab": 32_000, "heads": 16, "kv_heads": 4, "seq": 2048}
TINY = {"width": 128, "inner": 352, "layers": 6, "vocab": 512, "heads": 4, "kv_heads": 2, "seq": 128}
WARM_UP = 3


def measured(remat: str, budget: str, rows: int, steps: int, tiny: bool) -> dict[str, object]:
    """Median step seconds and peak bytes of a run."""
    import numpy as np

    shape = TINY if tiny else SHAPE
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    spec = uniform(
        vocab_size=shape["vocab"],
        width=shape["width"],
        layers=shape["layers"],
        context=shape["seq"],
        mixer=Grouped(heads=shape["heads"], kv_heads=shape["kv_heads"]),
        feedforward=SwiGLU(width=shape["inner"]),
    )
    execution = Execution(device=device, precision="bf16", compile=device.type == "cuda")
    plan = ParallelPlan(remat=remat, remat_budget=budget)
    engine = apply(Causal().loss(build_model(spec, device="meta")), plan, AdamW(), execution=execution)
    tokens = np.random.default_rng(0).integers(0, shape["vocab"], (rows, shape["seq"] + 1))
    at = np.broadcast_to(np.arange(shape["seq"], dtype=np.int32), (rows, shape["seq"]))
    batch = Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        loss_mask=np.ones((rows, shape["seq"]), dtype=bool),
        documents=np.zeros((rows, shape["seq"]), dtype=np.int32),
        positions=at,
    )
    times, losses = [], []
    for step in range(WARM_UP + steps):
        if step == WARM_UP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        losses.append(engine.step(batch).loss)
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    seconds = statistics.median(times[WARM_UP:])
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "remat": remat,
        "budget": budget if remat in SCHEDULES and remat != "sqrt" else "",
        "step_seconds": seconds,
        "tokens_per_second": rows * shape["seq"] / seconds,
        "peak_bytes": peak,
        "loss": losses[-1],
        "device": name,
        "torch": torch.__version__,
    }


def main() -> None:
    """Run each in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--budgets", nargs="+", default=["30%", "50%", "70%"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(*args.one, args.rows, args.steps, args.tiny)))
        return
    runs = [("none", "50%"), ("selective", "50%"), ("full", "50%"), ("sqrt", "50%")]
    runs += [(name, budget) for name in SCHEDULES if name != "sqrt" for budget in args.budgets]
    rows = []
    for remat, budget in runs:
        words = [sys.executable, __file__, "--one", remat, budget, "--rows", str(args.rows), "--steps", str(args.steps)]
        done = subprocess.run([*words, *["--tiny"] * args.tiny], capture_output=True, text=True)
        if done.returncode:
            print(f"{remat:<10} {budget:>5}  {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append(row)
        print(
            f"{remat:<10} {row['budget']:>5}  {1e3 * row['step_seconds']:8.1f} ms  {row['tokens_per_second']:>10,.0f} tokens/s  "
            f"{bytes_(row['peak_bytes']):>9}  loss {row['loss']:.4f}",
            flush=True,
        )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
