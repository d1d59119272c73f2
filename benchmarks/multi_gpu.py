"""Tokens a second of training steps over several GPUs of one machine, by plan, beside transformers under FSDP2.

    python benchmarks/multi_gpu.py --gpus 2
    python benchmarks/multi_gpu.py --gpus 4 --only one shard --rows 4 --profile DIR
    python benchmarks/multi_gpu.py --tiny    # a CPU: shows that every contestant runs, times mean nothing

The LLaMA shape of 1.1B parameters of `gpu_step.py` with 32 heads, sequences of 2,048 random tokens, --rows of them a GPU,
bf16 matmuls over fp32 weights, AdamW, gradient clipping, compiled. Luban's plans share their processes; step times
are medians over CUDA events after warm-up, of the first process. `weak` is the rate a GPU relative to the same library
on one GPU; under tensor, context and pipeline plans all GPUs work on the same --rows rows, and `speedup` is the rate
relative to one GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_step import SHAPE, TINY, RandomBatch, T, llama_config, luban_spec, timed
from kernel_table import kernel_table
from torch import nn

from luban.core.plan import ParallelPlan
from luban.models.build import build_model
from luban.objectives.causal import Causal
from luban.optim.adamw import AdamW
from luban.parallel.apply import Execution, apply
from luban.parallel.world import World


def plans(gpus: int) -> dict[str, ParallelPlan]:
    """Luban's contestants by name."""
    found = {
        "one": ParallelPlan(),
        "replicate": ParallelPlan(replicate=gpus),
        "shard": ParallelPlan(shard=gpus),
        "shard-zero2": ParallelPlan(shard=gpus, zero=2),
        "tensor": ParallelPlan(tensor=gpus),
        "context": ParallelPlan(context=gpus),
        "pipeline": ParallelPlan(pipeline=gpus, microbatches=2 * gpus, schedule="1f1b"),
    }
    if gpus > 2:
        found["interleaved"] = ParallelPlan(pipeline=gpus, microbatches=2 * gpus, schedule="interleaved", interleave=2)
        found["tensor-shard"] = ParallelPlan(tensor=2, shard=gpus // 2)
    return found


PEERS = ("peer-one", "peer-shard")
ALONE = ("one", *PEERS)  # each in processes of its own


def rows_of(name: str, rows: int, gpus: int) -> int:
    """Rows of a whole batch: as many a GPU where GPUs read different rows, else as on one."""
    return rows * (1 if name in ("one", "peer-one", "tensor", "context", "pipeline", "interleaved") else gpus)


def luban_step(
    plan: ParallelPlan, rows: int, seq: int, tiny: bool, device: torch.device, accumulate: int = 1
) -> Callable[[], object]:
    """A step of the trainer's own engine over so many micro-batches."""
    shape, heads = (TINY, 4) if tiny else (SHAPE, 32)
    world = World.join(plan, device)
    spec = luban_spec(shape, heads, seq)
    execution = Execution(device=device, precision="bf16", compile=not tiny, world=world, accumulate=accumulate)
    engine = apply(Causal().loss(build_model(spec, device="meta")), plan, AdamW(lr=1e-4), execution=execution)
    batch = RandomBatch(rows, seq, shape["vocab"])
    return lambda: engine.submit(batch)


def peer_step(gpus: int, rows: int, seq: int, tiny: bool, device: torch.device) -> Callable[[], object]:
    """transformers' LLaMA, compiled layer by layer, under FSDP2 with bf16 parameters over fp32 ones where there are several."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import LlamaForCausalLM

    shape, heads = (TINY, 4) if tiny else (SHAPE, 32)
    with torch.device(device):
        model = LlamaForCausalLM(llama_config(shape, heads, seq))
    if not tiny:
        for layer in model.model.layers:
            layer.compile()
    if gpus > 1:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, shape["vocab"], (rows // gpus, seq), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=gpus == 1):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def contest(name: str, call: argparse.Namespace) -> dict[str, float]:
    """One contestant, in this process of several; with `call.profile` a table of the first process's kernels in that folder."""
    gpus, tiny, seq = call.gpus, call.tiny, call.seq or (64 if call.tiny else T)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    whole = rows_of(name, call.rows, gpus)
    if name in PEERS:
        if processes > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        step = peer_step(processes, whole, seq, tiny, device)
    else:
        step = luban_step(replace(plans(gpus)[name], remat=call.remat), whole, seq, tiny, device)
    for _ in range(4):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(step, call.steps))
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    if call.profile:
        table = kernel_table(step)
        if os.environ.get("RANK", "0") == "0":
            call.profile.mkdir(parents=True, exist_ok=True)
            (call.profile / f"{name}.txt").write_text(table)
    return {
        "tokens_per_second": whole * seq / seconds,
        "step_ms": 1e3 * seconds,
        "peak_gb": peak,
        "processes": processes,
    }


def free_ports(count: int) -> str:
    """So many ports of this machine, with commas between."""
    with ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return ",".join(str(probe.getsockname()[1]) for probe in probes)


def started(names: list[str], call: argparse.Namespace) -> Iterator[tuple[str, dict[str, float] | str]]:
    """Run contestants one after another in the same processes: (name, what the first process measured, or why not)."""
    processes = 1 if names[0] in ("one", "peer-one") else call.gpus
    ports = free_ports(len(names))
    options = ["--inside", *names, "--gpus", call.gpus, "--rows", call.rows, "--steps", call.steps]
    options += ["--seq", call.seq] if call.seq else []
    options += ["--remat", call.remat, *(["--tiny"] if call.tiny else [])]
    options += ["--profile", call.profile] if call.profile else []
    command = [sys.executable, __file__, *map(str, options)]
    missing, said = list(names), []
    for line in lines_of(command, processes, call.patience * len(names), PORTS=ports):
        if line.startswith("{"):
            yield missing.pop(0), json.loads(line)
        else:
            said.append(line)
    for name in missing:
        yield name, " ".join(said[-5:])[-600:] or "took too long"


def lines_of(command: list[str], processes: int, patience: float, **environment: str) -> Iterator[str]:
    """What the first of so many processes of one run prints; all are ended with it, or after `patience` seconds."""
    running = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        threads = str(max(torch.get_num_threads() // processes, 1))  # else each process takes all cores
        meeting = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads, **environment}
        whole = {**os.environ, **meeting, **{key: str(value) for key, value in place.items()}}
        pipes = (
            {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if rank == 0 else {"stdout": subprocess.DEVNULL}
        )
        running.append(subprocess.Popen(command, env=whole, text=True, **pipes))
    late = threading.Timer(patience, lambda: [process.kill() for process in running])
    late.start()
    for line in running[0].stdout:
        yield line.strip()
    for process in running:
        process.kill()  # those that wait for one that failed
        process.wait()
    late.cancel()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--profile", type=Path, help="folder for a table of kernels of each contestant's first process")
    parser.add_argument("--seq", type=int, help="tokens a row (2,048)")
    parser.add_argument("--remat", default="none", help="rematerialisation of Luban's plans")
    parser.add_argument("--patience", type=float, default=120, help="seconds after which a contestant is given up")
    parser.add_argument("--inside", nargs="*", help=argparse.SUPPRESS)
    call = parser.parse_args()
    if call.inside:
        for name, port in zip(call.inside, os.environ["PORTS"].split(","), strict=True):
            os.environ["MASTER_PORT"] = port  # a store that is being closed must not be found again
            found = contest(name, call)
            if os.environ.get("RANK", "0") == "0":
                print(json.dumps(found), flush=True)
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {call.gpus} × {chip}, {call.rows} rows a GPU", flush=True)
    rates: dict[str, dict[str, float]] = {}
    names = call.only or ["one", "peer-one", *list(plans(call.gpus))[1:], "peer-shard"]
    groups = [[name] for name in names if name in ALONE]
    shared = [name for name in names if name not in ALONE]
    for name, row in chain.from_iterable(started(group, call) for group in (*groups, shared) if group):
        if isinstance(row, str):
            print(f"{name:14s} failed: {row}", flush=True)
            continue
        rates[name] = row
        alone = rates.get("peer-one" if name in PEERS else "one", {}).get("tokens_per_second", float("nan"))
        speedup = row["tokens_per_second"] / alone
        share = f"  weak {100 * speedup / row['processes']:.1f}%" if rows_of(name, 1, 2) == 2 else ""
        print(
            f"{name:14s} {row['tokens_per_second'] / 1e3:7.1f}k tokens/s  {row['step_ms']:7.1f} ms  "
            f"{row['peak_gb']:5.1f} GB a GPU  speedup {speedup:.2f}{share}",
            flush=True,
        )
        if call.out:
            call.out.write_text(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
