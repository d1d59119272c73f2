"""All optimizers on one model at equal time: held-out bits a byte of a byte-level decoder.

    python benchmarks/optimizers.py --data tinyshakespeare.txt --seconds 6 --batch 8       # one CPU core, ten minutes
    python benchmarks/optimizers.py --data FILE --device cuda --seconds 120            # 12 layers of width 512, bf16

For each optimizer the time of a step is measured (CPU time of the process, or a GPU's), and with it the number of steps that fit into
the time. Learning rates of 1/4, 1/2, 1, 2 and 4 times its default are tried with a third of the steps; with the best, and
twice and half of it, it is trained with all steps, over several seeds. Warm-up is a twentieth of the steps, then a cosine to zero, or a constant rate for
schedule-free AdamW. Prints a table in order of the mean over seeds of the best rate, with its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_models import GPU, SMALL, Size, batches, clock, heldout, make_engine, read_text, sized, spec_of, train

from luban.optim.base import OptimizerConfig
from luban.optim.schedule.base import Schedule
from luban.optim.schedule.constant import Constant
from luban.optim.schedule.cosine import Cosine

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
TIMED = 12  # steps, after as many that warm up


def with_rate(config: OptimizerConfig, factor: float) -> OptimizerConfig:
    """The optimizer with all its learning rates times a factor."""
    rates = {name: getattr(config, name) * factor for name in ("lr", "adamw_lr") if hasattr(config, name)}
    return replace(config, **rates)


def one(
    config: OptimizerConfig, size: Size, texts: tuple[np.ndarray, np.ndarray], steps: int, seed: int, device: str
) -> float:
    """Held-out bits a byte after so many steps."""
    engine = make_engine(spec_of(size), config, device=device, seed=seed)
    kind = Constant if config.keeps_rate else Cosine
    schedule: Schedule = kind(warmup=max(steps // 20, 1), **({} if config.keeps_rate else {"final": 0.0}))
    train(engine, batches(texts[0], size, seed), steps, schedule.factor)
    return heldout(engine, texts[1], size)


def step_seconds(config: OptimizerConfig, size: Size, text: np.ndarray, device: str) -> float:
    """Of one training step."""
    engine, given = make_engine(spec_of(size), config, device=device, seed=0), batches(text, size, 0)
    train(engine, given, TIMED, lambda step, steps: 0.1)
    began = clock(device)
    train(engine, given, TIMED, lambda step, steps: 0.1)
    return (clock(device) - began) / TIMED


def measure(
    name: str, size: Size, texts: tuple[np.ndarray, np.ndarray], seconds: float, seeds: int, device: str
) -> dict[str, Any]:
    """One row of the table."""
    config: OptimizerConfig = OptimizerConfig.registry[name]()
    step = step_seconds(config, size, texts[0], device)
    steps = max(int(seconds / step), 30)
    tried = {f: one(with_rate(config, f), size, texts, max(steps // 3, 10), 0, device) for f in FACTORS}
    best = min(tried, key=lambda f: tried[f] if math.isfinite(tried[f]) else math.inf)
    found = {f: [one(with_rate(config, f), size, texts, steps, 0, device)] for f in (best / 2, best, best * 2)}
    best = min(found, key=lambda f: found[f][0] if math.isfinite(found[f][0]) else math.inf)
    found[best] += [one(with_rate(config, best), size, texts, steps, seed, device) for seed in range(1, seeds)]
    row = {"optimizer": name, "lr": config.lr * best, "step_ms": step * 1e3, "steps": steps, "bits": found[best]}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Measure every optimizer, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    names = sorted(OptimizerConfig.registry)
    parser.add_argument("--only", nargs="+", default=names, choices=names)
    for field in ("width", "layers", "tokens", "batch"):
        parser.add_argument(f"--{field}", type=int)
    parser.add_argument("--out", type=Path, help="rows as JSON")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    changes = {field: getattr(given, field) for field in ("width", "layers", "tokens", "batch")}
    size = sized(SMALL if given.device == "cpu" else GPU, **changes)
    texts = read_text(given.data)
    found = [measure(name, size, texts, given.seconds, given.seeds, given.device) for name in given.only]
    found.sort(key=lambda row: statistics.mean(row["bits"]))
    print("| optimizer | learning rate | ms a step | steps | bits a byte |\n|-|-|-|-|-|")
    for row in found:
        bits = row["bits"]
        error = f" ± {statistics.stdev(bits) / len(bits) ** 0.5:.3f}" if len(bits) > 1 else ""
        print(
            f"| {row['optimizer']} | {row['lr']:.2g} | {row['step_ms']:.1f} | {row['steps']:,} "
            f"| {statistics.mean(bits):.3f}{error} |"
        )
    if given.out:
        given.out.write_text(json.dumps({"device": given.device, "torch": torch.__version__, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
