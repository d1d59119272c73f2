"""Step time and memory of plans over the GPUs of one machine, beside what `luban plan` predicts of them; whether its best is the best.

    python benchmarks/planned_steps.py --gpus 4 --plans 4 --machine machine.toml --out planned.json
    python benchmarks/planned_steps.py --tiny    # two processes of a CPU: shows that plans run, times mean nothing

The LLaMA shape of 1.1B parameters of `gpu_step.py` with 32 heads, --rows sequences of 2,048 random tokens a GPU, bf16 over fp32
masters, AdamW, compiled. Of the best plan of each division of the GPUs (those that fit, and that luban pretrain can run), the planner's
first and others drawn by --seed among those within --within times its time. `--machine`: rates of this machine (luban bench
machine); without it the table that ships for the GPU. Seconds are the median step behind four that aren't counted, of the first
process; memory is the most that torch's allocator held in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_step import SHAPE, TINY, T, timed
from multi_gpu import free_ports, lines_of, luban_step

from luban.core.config import from_dict
from luban.core.plan import ParallelPlan
from luban.planner.accelerators import accelerators
from luban.planner.cluster import Cluster
from luban.planner.search.plans import best_plans, described
from luban.train.planning import planned, settings_of
from luban.train.recipe import Recipe

HEADS, TINY_HEADS = 32, 4
Row = dict[str, Any]


def found_plans(call: argparse.Namespace) -> list[Row]:
    """The planner's first plan and others, with what is predicted of them."""
    shape, heads = (TINY, TINY_HEADS) if call.tiny else (SHAPE, HEADS)
    seq = 64 if call.tiny else T
    layer = {
        "mixer": {"type": "grouped", "heads": heads, "kv_heads": shape["kv_heads"]},
        "feedforward": {"type": "swiglu", "width": shape["inner"]},
    }
    model = {"vocab_size": shape["vocab"], "width": shape["width"], "layers": shape["layers"], "context": seq}
    train = {"batch_size": call.rows * call.gpus, "seq_len": seq, "precision": "bf16", "compile": True}
    recipe = from_dict(Recipe, {"model": {**model, "layer": layer}, "train": train})
    row = next((name for name, known in accelerators().items() if chip() in known.names), "h100-sxm")
    cluster = Cluster(gpu=row, nodes=1, gpus_per_node=call.gpus, machine=str(call.machine or ""))
    problem = planned(recipe, cluster, cluster.table(Path()))
    known = [e for e in best_plans(problem.space, problem.workload, cluster, 10**6) if problem.refusal(e) is None]
    near = [each for each in known[1:] if each.seconds <= call.within * known[0].seconds]
    drawn = random.Random(call.seed).sample(near, min(call.plans - 1, len(near)))
    return [
        {
            "plan": described(each.candidate),
            "settings": settings_of(each),
            "predicted_ms": 1e3 * each.seconds,
            "predicted_gb": each.memory / 1e9,
        }
        for each in (known[0], *drawn)
    ]


def measured(settings: Row, call: argparse.Namespace) -> Row:
    """One plan, in this process of several."""
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0  # what the last plan may have left
    plan, seq = ParallelPlan(**settings["plan"]), 64 if call.tiny else T
    step = luban_step(plan, call.rows * call.gpus, seq, call.tiny, device, settings["train"]["accumulate"])
    for _ in range(4):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(step, call.steps))
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if device.type == "cuda" else 0.0
    return {"ms": 1e3 * seconds, "gb": peak}


def inside(call: argparse.Namespace) -> None:
    """One process of those that run all plans, one after another."""
    for settings, port in zip(json.loads(os.environ["PLANS"]), os.environ["PORTS"].split(","), strict=True):
        os.environ["MASTER_PORT"] = port
        found = measured(settings, call)
        if os.environ["RANK"] == "0":
            print(json.dumps(found), flush=True)
        if dist.is_initialized():
            dist.destroy_process_group()
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def run(rows: list[Row], call: argparse.Namespace) -> None:
    """Measure the plans, and write into their rows."""
    plans, ports = json.dumps([row["settings"] for row in rows]), free_ports(len(rows))
    command = [sys.executable, __file__, *sys.argv[1:], "--inside"]
    waiting, said = list(rows), []
    for line in lines_of(command, call.gpus, call.patience, PLANS=plans, PORTS=ports):
        if not line.startswith("{"):
            said.append(line)
            continue
        row = waiting.pop(0)
        row |= json.loads(line)
        print(shown(row), flush=True)
        if call.out:
            call.out.write_text(json.dumps(rows, indent=1))
    if waiting:
        print(f"{len(waiting)} not measured: {' '.join(said[-5:])[-600:] or 'they took too long'}", flush=True)


def shown(row: Row) -> str:
    """One plan's line."""
    time, memory = row["predicted_ms"] / row["ms"] - 1, row["predicted_gb"] / row["gb"] - 1 if row["gb"] else 0.0
    return (
        f"{row['plan']:64s} {row['ms']:8.1f} ms, predicted {row['predicted_ms']:8.1f} ({time:+.1%})   "
        f"{row['gb']:5.1f} GB, predicted {row['predicted_gb']:5.1f} ({memory:+.1%})"
    )


def chip() -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--plans", type=int, default=4)
    parser.add_argument("--within", type=float, default=3.0, help="of the best plan's time, those that are drawn")
    parser.add_argument("--rows", type=int, default=8, help="a GPU")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--machine", type=Path, help="file of luban bench machine")
    parser.add_argument("--patience", type=float, default=500, help="seconds after which the rest is given up")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.inside:
        inside(call)
        return
    rows = found_plans(call)
    print(f"torch {torch.__version__}, {call.gpus} × {chip()}, {call.rows} rows a GPU", flush=True)
    run(rows, call)
    done = [row for row in rows if "ms" in row]
    if "ms" in rows[0] and len(done) > 1:
        fastest = min(row["ms"] for row in done)
        print(f"the planner's first takes {rows[0]['ms'] / fastest - 1:.1%} longer than the fastest of {len(done)}")


if __name__ == "__main__":
    main()
