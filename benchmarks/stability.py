"""What keeps training stable at learning rates that break some models: norms, initial values, warm-up, z-loss, embedding shrink, clipping.

    python benchmarks/stability.py --data tinyshakespeare.txt                 # one CPU core, 15 minutes
    python benchmarks/stability.py --data FILE --device cuda --steps 2000     # 12 layers of width 512, bf16

Deep, narrow byte-level decoders are trained with AdamW (β₂ = 0.999) at a constant rate. The base is pre-norm with GPT-2's initial values (0.02,
residual writes divided by √(2·layers)), warm-up over a tenth of the steps and clipping at 1; every other row changes one thing.
A run is broken where it ends above the entropy of single bytes, or is not finite. A spike is a step whose loss lies
0.5 nats above the lowest mean of ten steps before it. Prints bits a byte on held-out text (mean over seeds), broken runs and spikes for each rate, in
order of the bits at the highest rate; with --out all runs are written and those that are there aren't run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_models import GPU, Size, batches, heldout, make_engine, read_text, sized, spec_of, train
from kept import rows_of

from luban.models.arrangement.deepnorm import DeepNorm
from luban.models.arrangement.post import PostNorm
from luban.models.arrangement.sandwich import SandwichNorm
from luban.nn.init import FanInInit, NormalInit, XavierInit
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm, RMSNorm
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.optim.schedule.constant import Constant

DEEP = Size(width=32, layers=8, heads=2, tokens=32, batch=8, windows=64)
RATES = (1e-2, 4e-2)
OVER, CALM = 0.5, 10  # nats above the lowest mean of so many steps that make a spike


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table: what differs from the base."""

    model: dict[str, Any] = field(default_factory=dict)
    objective: Causal = field(default_factory=Causal)
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0
    embedding_gradient: float = 1.0


def variants(size: Size) -> dict[str, Variant]:
    """Name → what differs."""
    unscaled = {"scale_residual": False}
    return {
        "base": Variant(),
        "LayerNorm": Variant(model={"norm": LayerNorm()}),
        "post-norm": Variant(model={"arrangement": PostNorm()}),
        "DeepNorm": Variant(model={"arrangement": DeepNorm(), "init": XavierInit(**unscaled)}),
        "sandwich": Variant(model={"arrangement": SandwichNorm()}),
        "QK-norm": Variant(model={"mixer": Grouped(heads=size.heads, qk_norm=RMSNorm())}),
        "init: residual not scaled": Variant(model={"init": NormalInit(**unscaled)}),
        "init: fan-in": Variant(model={"init": FanInInit()}),
        "init: 0.2": Variant(model={"init": NormalInit(std=0.2, **unscaled)}),
        "no warm-up": Variant(warmup=0.0),
        "z-loss 1e-3": Variant(objective=Causal(z_loss=1e-3)),
        "embedding shrink 0.1": Variant(embedding_gradient=0.1),
        "embedding norm": Variant(model={"embedding_norm": RMSNorm()}),
        "no clipping": Variant(clip=0.0),
    }


def run(
    made: Variant, size: Size, texts: tuple[np.ndarray, np.ndarray], lr: float, steps: int, seed: int, device: str
) -> dict[str, float]:
    """One run's held-out bits a byte, last loss and spikes."""
    engine = make_engine(
        spec_of(size, **made.model),
        AdamW(lr=lr, betas=(0.9, 0.999)),
        device=device,
        seed=seed,
        objective=made.objective,
        clip=made.clip,
        embedding_gradient=made.embedding_gradient,
    )
    schedule = Constant(warmup=round(made.warmup * steps))
    losses, norms = train(engine, batches(texts[0], size, seed), steps, schedule.factor)
    bits = heldout(engine, texts[1], size)
    return {"bits": bits if math.isfinite(bits) else float("inf"), "spikes": spikes(losses), "norm": max(norms)}


def spikes(losses: Sequence[float]) -> int:
    """Steps that begin to lie above the calm before them."""
    found, above, lowest = 0, False, math.inf
    for step in range(CALM, len(losses)):
        lowest = min(lowest, statistics.mean(losses[step - CALM : step]))
        now = not losses[step] < lowest + OVER
        found, above = found + (now and not above), now
    return found


def entropy(text: np.ndarray) -> float:
    """Bits of a byte that is guessed from frequencies alone."""
    shares = np.bincount(text, minlength=256) / len(text)
    return float(-sum(p * math.log2(p) for p in shares if p))


def table(found: dict[str, Any], names: Sequence[str], rates: Sequence[float], seeds: int, broken: float) -> str:
    """In Markdown, in order of the highest rate."""

    def cell(name: str, lr: float) -> str:
        runs = [found[f"{name}/{lr:g}/{seed}"] for seed in range(seeds)]
        bits = [each["bits"] for each in runs]
        failed = sum(not b < broken for b in bits)
        error = statistics.stdev(bits) / seeds**0.5 if seeds > 1 and not failed else None
        mean = statistics.mean(bits)
        shown = f"{mean:.2f}" + (f" ± {error:.2f}" if error is not None else "")
        return f"{shown}{f', {failed} of {seeds} broken' if failed else ''}, {sum(r['spikes'] for r in runs)}"

    def score(name: str) -> float:
        return statistics.mean(min(found[f"{name}/{rates[-1]:g}/{seed}"]["bits"], 99.0) for seed in range(seeds))

    head = "| | " + " | ".join(f"rate {lr:g}" for lr in rates) + " |\n|" + "-|" * (len(rates) + 1)
    lines = [f"| {name} | " + " | ".join(cell(name, lr) for lr in rates) + " |" for name in sorted(names, key=score)]
    return "\n".join([head, *lines])


def main() -> None:
    """Train every variant at every rate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--only", nargs="+", choices=list(variants(DEEP)), help="rows")
    for name in ("width", "layers", "tokens", "batch"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--out", type=Path, help="all runs as JSON")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    changes = {name: getattr(given, name) for name in ("width", "layers", "tokens", "batch")}
    size = sized(DEEP if given.device == "cpu" else GPU, **changes)
    texts, every = read_text(given.data), variants(size)
    names = given.only or list(every)
    settings = {"device": given.device, "steps": given.steps, "bytes": sum(map(len, texts)), **asdict(size)}
    kept = rows_of(given.out, **settings)
    found = kept["rows"]
    for seed in range(given.seeds):
        for name in names:
            for lr in given.rates:
                key = f"{name}/{lr:g}/{seed}"
                if key not in found:
                    found[key] = run(every[name], size, texts, lr, given.steps, seed, given.device)
                    print(key, found[key], flush=True)
                if given.out:
                    given.out.write_text(json.dumps(kept, indent=1))
    print(f"a run is broken above {entropy(texts[1]):.2f} bits a byte; cells: bits a byte, spikes over all seeds")
    print(table(found, names, given.rates, given.seeds, entropy(texts[1])))


if __name__ == "__main__":
    main()
