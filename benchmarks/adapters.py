"""Training steps of LoRA on one GPU, beside Hugging Face's PEFT, and over a base in 4 bits.

    python benchmarks/adapters.py [--only NAME …] [--steps 10] [--out FILE.json] [--tiny]

The LLaMA shape of 1.1B parameters of `gpu_step.py` with heads of 64, frozen in bf16; LoRA of rank 16 on every linear layer, α = 32,
without dropout; 8 sequences of 2,048 random tokens. `peft` is LlamaForCausalLM under `get_peft_model` with its adapters in bf16,
compiled as a whole, with torch's fused AdamW, `peft-layers` the same compiled layer by layer, which starts sooner; `luban` is
the step of `luban sft --train.compile true` with fp32 masters of what is trained; `luban-nf4` has its frozen matrices in 4-bit
NormalFloat, and `luban-nf4-12` computes activations again so that all fits into 12 GiB; `luban-full` tunes every weight.

Every run has a process of its own, so that its memory is its own too. Tokens a second by the median step after warm-up, peak
memory by torch's allocator, seconds until the end of the warm-up, compilation included. Checked on a GPU: luban ≥ 1.5 × the faster
of PEFT's and ≤ 28 GiB; luban-nf4-12 ≤ 12 GiB and ≥ 0.75 × luban. Writes --out, where what other calls found stays and is compared
with; a file of another GPU, torch, --steps, --budget or --tiny is refused. Exits 1 where a check fails. --tiny runs on a CPU in a
minute, and checks nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from gpu_step import SHAPE, TINY, RandomBatch, T, llama_config, luban_spec
from kept import rows_of
from kernel_table import kernel_table

from luban.adapters.base import rates_of
from luban.adapters.lora import LoRA
from luban.core.plan import ParallelPlan
from luban.models.build import build_model, state_of
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.apply import Execution, apply

RANK, ALPHA, ROWS, HEADS, WARM = 16, 32, 8, 32, 3
NAMES = ("peft", "peft-layers", "luban", "luban-nf4", "luban-nf4-12", "luban-full")
# Activations alone take more than 12 GiB, whatever the weights take.
PLANS = {"luban-nf4-12": ParallelPlan(remat="rotor", remat_budget="10GB", remat_layer="selective")}
GIB = 2**30


def peft_step(shape: dict[str, int], rows: int, seq: int, device: str, *, layers: bool) -> Callable[[], object]:
    """A step of PEFT's LoRA, compiled as a whole or layer by layer."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    with torch.device(device):
        base = LlamaForCausalLM(llama_config(shape, HEADS, seq)).to(torch.bfloat16)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    compiled = torch.compile(model) if device == "cuda" and not layers else model
    if device == "cuda" and layers:
        for layer in base.model.layers:
            layer.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        tokens = torch.randint(0, shape["vocab"], (rows, seq), device=device)
        optimizer.zero_grad(set_to_none=True)
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return step


def luban_step(
    name: str, plan: ParallelPlan, shape: dict[str, int], rows: int, seq: int, device: str
) -> Callable[[], object]:
    """A step of Luban's."""
    spec = luban_spec(shape, HEADS, seq)
    model = build_model(spec, device="meta")
    execution = Execution(
        device=torch.device(device), precision="bf16", compile=device == "cuda" or plan.remat_layer != "none"
    )
    parts = {"execution": execution, "init": 0}
    if name != "luban-full":
        config = LoRA(
            rank=min(RANK, shape["width"] // HEADS),
            alpha=ALPHA,
            base="nf4" if name.startswith("luban-nf4") else "float",
        )
        weights = state_of(build_model(spec, seed=0))
        parts["init"] = weights | config.initial(spec, weights, 0)
        parts |= {"adapt": config.adapt, "rates": rates_of}
        parts |= {"pack": config.pack_base} if config.base != "float" else {}
    engine = apply(Causal().loss(model), plan, AdamW(lr=1e-4), **parts)
    batch = RandomBatch(rows, seq, shape["vocab"])
    return lambda: engine.submit(batch)


def on_gpu(tiny: bool) -> bool:
    """Whether it runs on a GPU."""
    return torch.cuda.is_available() and not tiny


def measure(name: str, steps: int, *, tiny: bool, budget: str | None, profile: Path | None) -> dict[str, float]:
    """Tokens a second and peak GiB of one contestant, in this process."""
    started = time.perf_counter()
    device = "cuda" if on_gpu(tiny) else "cpu"
    shape, rows, seq = (TINY, 2, 64) if tiny else (SHAPE, ROWS, T)
    plan = PLANS.get(name, ParallelPlan())
    if budget and plan.remat == "rotor":
        plan = replace(plan, remat_budget=budget)
    if name.startswith("peft"):
        step = peft_step(shape, rows, seq, device, layers=name == "peft-layers")
    else:
        step = luban_step(name, plan, shape, rows, seq, device)

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM):
        step()
    synchronize()
    ready = time.perf_counter() - started
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / GIB if device == "cuda" else 0.0
    if profile:
        profile.mkdir(parents=True, exist_ok=True)
        (profile / f"{name}.txt").write_text(kernel_table(step))
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    return {"tokens_per_second": rows * seq / median, "spread": spread, "peak_gib": peak, "start_s": ready}


def failures(found: dict[str, dict[str, float]]) -> list[str]:
    """The checks that fail, of the contestants that ran."""
    failed = []
    rate = {name: row["tokens_per_second"] for name, row in found.items()}
    memory = {name: row["peak_gib"] for name, row in found.items()}
    if "luban" in rate and memory["luban"] > 28:
        failed.append(f"luban takes {memory['luban']:.1f} GiB, more than 28")
    peers = [rate[name] for name in ("peft", "peft-layers") if name in rate]
    if "luban" in rate and peers and rate["luban"] < 1.5 * max(peers):
        failed.append(f"luban is {rate['luban'] / max(peers):.2f} × peft, less than 1.5")
    small = "luban-nf4-12"
    if small in rate and memory[small] > 12:
        failed.append(f"{small} takes {memory[small]:.1f} GiB, more than 12")
    if {"luban", small} <= rate.keys() and rate[small] < 0.75 * rate["luban"]:
        failed.append(f"{small} is {rate[small] / rate['luban']:.2f} × luban, less than 0.75")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budget", help="of the schedule of luban-nf4-12, such as 9GB")
    parser.add_argument("--profile", type=Path, help="folder for a table of kernels of each contestant")
    parser.add_argument("--alone", choices=NAMES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.alone, args.steps, tiny=args.tiny, budget=args.budget, profile=args.profile)))
        return 0
    settings = {name: getattr(args, name) for name in ("tiny", "steps", "budget")}
    settings |= {"torch": torch.__version__, "chip": torch.cuda.get_device_name() if on_gpu(args.tiny) else "cpu"}
    kept = rows_of(args.out, **settings)
    found: dict[str, dict[str, float]] = kept["rows"]
    for name in args.only:
        command = [sys.executable, __file__, "--alone", name, "--steps", str(args.steps), *["--tiny"] * args.tiny]
        command += ["--budget", args.budget] if args.budget else []
        command += ["--profile", str(args.profile)] if args.profile else []
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            print(f"{name} failed: {run.stderr.strip().splitlines()[-1] if run.stderr.strip() else 'no message'}")
            return 1
        row = found[name] = json.loads(run.stdout.splitlines()[-1])
        print(
            f"{name:12} {row['tokens_per_second']:10,.0f} tokens/s ±{row['spread']:.0%}  {row['peak_gib']:6.1f} GiB  "
            f"{row['start_s']:4.0f} s until warm",
            flush=True,
        )
        if args.out:
            args.out.write_text(json.dumps(kept, indent=1))
    for name in ("luban-nf4", "luban-nf4-12"):
        if {"luban", name} <= found.keys():
            share = found[name]["tokens_per_second"] / found["luban"]["tokens_per_second"]
            print(f"{name} is {share:.2f} × luban")
    failed = [] if args.tiny else failures(found)
    print("\n".join(failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
