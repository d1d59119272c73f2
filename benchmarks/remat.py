"""Step time and peak memory of every way of rematerialisation on one GPU, beside what is predicted.

    python benchmarks/remat.py [--only NAME …] [--out FILE.json] [--rows 16] [--steps 8] [--patience 120] [--tiny]

The LLaMA shape of 1.1B parameters of gpu_step.py, bf16 with fp32 masters. Names: none, selective, full, sqrt; rotor-50 and pofo-30
say the budget, a share of the activations that saving everything takes (65% are about what selective takes); …-selective has layers
that are kept save their matmuls and attention alone (`--plan.remat_layer selective`), and a share of what those take. Every case is printed as it ends and given up after --patience seconds; with --out
several calls fill one table. --tiny: a small model on whatever device there is.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from in_turns import Row, device_name, in_turns, take_cores
from llama_runs import LLAMA, TINY, Shape, engine_of, predicted, timed

from luban.core.plan import ParallelPlan
from luban.core.units import bytes_

PLANS = {
    "none": ParallelPlan(),
    "selective": ParallelPlan(remat="selective"),
    "full": ParallelPlan(remat="full"),
    "rotor-50": ParallelPlan(remat="rotor", remat_budget="50%"),
    "rotor-30": ParallelPlan(remat="rotor", remat_budget="30%"),
    "rotor-65": ParallelPlan(remat="rotor", remat_budget="65%"),
    "rotor-50-selective": ParallelPlan(remat="rotor", remat_budget="50%", remat_layer="selective"),
    "rotor-30-selective": ParallelPlan(remat="rotor", remat_budget="30%", remat_layer="selective"),
    "pofo-30": ParallelPlan(remat="pofo", remat_budget="30%"),
    "pofo-50": ParallelPlan(remat="pofo", remat_budget="50%"),
    "sqrt": ParallelPlan(remat="sqrt"),
}


def measured(plan: ParallelPlan, shape: Shape, rows: int, steps: int) -> Row:
    """One case."""
    began = time.perf_counter()
    row = {"remat": plan.remat, "budget": plan.remat_budget, "layer": plan.remat_layer}
    row |= predicted(shape, plan, rows)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    engine = engine_of(shape, plan)
    row["start_seconds"] = time.perf_counter() - began
    return row | timed(engine, shape, rows, steps)


def line(name: str, row: Row) -> str:
    """Of the table."""
    return (
        f"{name:<19} {1e3 * row['step_seconds']:8.1f} ms (predicted {1e3 * row['predicted_seconds']:7.1f})  "
        f"{bytes_(row['peak_bytes']):>9} (predicted {bytes_(row['predicted_bytes'])})  "
        f"{row['tokens_per_second']:>9,.0f} tokens/s  loss {row['loss']:.4f}  "
        f"start {row['start_seconds']:.0f} s, first step {row['first_step_seconds']:.0f} s and {bytes_(row['first_peak_bytes'])}, "
        f"whole {row['whole_seconds']:.0f} s"
    )


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(PLANS))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--patience", type=float, default=120, help="seconds of a case")
    parser.add_argument("--out", type=Path, help="JSON that every call adds to")
    parser.add_argument("--tiny", action="store_true")
    call = parser.parse_args()
    shape = TINY if call.tiny else LLAMA
    print(f"torch {torch.__version__}, {device_name()}, {take_cores()} threads, {call.rows} rows", flush=True)
    cases = {name: partial(measured, plan, shape, call.rows, call.steps) for name, plan in PLANS.items()}
    in_turns(cases, only=call.only, patience=call.patience, out=call.out, show=line)


if __name__ == "__main__":
    main()
