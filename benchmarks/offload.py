"""ZeRO-Offload and ZeRO-Infinity on one GPU: Adam on the host beside memory bandwidth, steps with and without offloading, updates on
a disk, the largest model that fits.

    python benchmarks/offload.py [--only NAME …] [--out FILE.json] [--folder DIR] [--rows 16] [--steps 8] [--cap 8] [--tiny]

adam: bytes a second of torch's fused kernel (28 a number: weight, gradient and two moments read, three written) beside a copy's.
device, host, delayed, disk, tiles: tokens a second of the LLaMA shape of 1.1B parameters in bf16, 16 × 2,048 tokens a step, selective
rematerialisation, with state on the GPU, on the host, with delayed updates, in a file of --folder by direct I/O; for disk also the
share of a step in which the GPU computes as ZeRO-Infinity's model has it, at the bandwidth that the folder reached. tiles: as host, with
the layers' matrices on the host too, read in four tiles each. layers, infinity: as host and as disk, with layers' half-precision weights
on the host or on the disk, which come to the device with their layer; infinity has sums of gradients on the disk, too.
fit-device, fit-host, fit-layers: under a cap on GPU memory (GB), the most layers with which a step runs. A model that fits in 8 GB with its state on
the host takes 70 GB of the host. Every case is printed as it ends and given up after --patience seconds; with --out several calls
fill one table. --tiny: small ones on whatever device there is.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from in_turns import Row, device_name, forget, in_turns, take_cores
from llama_runs import LLAMA, TINY, Shape, engine_of, predicted, timed

from luban.core.plan import ParallelPlan
from luban.core.units import bytes_, count
from luban.parallel.offload.pools import disk_bandwidth
from luban.planner.offload import efficiency, state_intensity

MOVED = 7 * 4  # bytes of a number that an update reads and writes
LAYERS = 640  # of a model that is tried, at most


def adam(numbers: int) -> Row:
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
    rates = {"adam": MOVED * numbers / _best(update), "copy": 8 * numbers / _best(lambda: other.copy_(weight))}
    return {"bytes_per_second": rates, "threads": torch.get_num_threads()}


def _best(work, rounds: int = 5) -> float:
    times = []
    for _ in range(1 + rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def step(plan: ParallelPlan, shape: Shape, call: argparse.Namespace) -> Row:
    """Steps with state in one place."""
    began, row = time.perf_counter(), {}
    if plan.offload == "disk":
        row["disk_bytes_per_second"] = disk_bandwidth(call.folder, 2**24 if call.tiny else 2**31)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    engine = engine_of(shape, replace(plan, remat="selective"))
    if plan.offload_delay:
        engine.optimizer.warm_up = 1
    parameters = sum(p.numel() for p in engine.params.parameters.values())
    row |= {"start_seconds": time.perf_counter() - began, "parameters": parameters}
    return row | timed(engine, shape, call.rows, call.steps)


def fit(plan: ParallelPlan, shape: Shape, call: argparse.Namespace) -> Row:
    """The most layers under the cap: from the number that is predicted, up or down by a sixteenth while time is left."""
    plan, began, best = replace(plan, remat="full"), time.perf_counter(), 0
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(call.cap * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    low, high = 1, 4 if call.tiny else LAYERS
    while low < high:
        middle = (low + high + 1) // 2
        fits = predicted(replace(shape, layers=middle), plan, 1)["predicted_bytes"] <= call.cap * 1e9
        low, high = (middle, high) if fits else (low, middle - 1)
    expected, failed, tried = low, LAYERS + 1, low
    parameters = {0: 0}
    while tried and tried not in parameters and tried < failed and time.perf_counter() - began < call.patience / 2:
        try:
            engine = engine_of(replace(shape, layers=tried), plan)
            engine.step(shape.batch(1))
            parameters[tried] = sum(p.numel() for p in engine.params.parameters.values())
            best = max(best, tried)
        except torch.OutOfMemoryError:
            failed = min(failed, tried)
        engine = None
        forget()
        if call.tiny:
            break
        tried = best + max(best // 16, 1) if best else tried - max(tried // 16, 1)
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
    return {"layers": best, "parameters": parameters[best], "expected_layers": expected, "cap_gb": call.cap}


def line(name: str, row: Row) -> str:
    """Of the table."""
    if "bytes_per_second" in row:
        fused, copy = row["bytes_per_second"]["adam"], row["bytes_per_second"]["copy"]
        return (
            f"{name:<10} fused Adam {bytes_(fused)}/s, a copy {bytes_(copy)}/s on {row['threads']} threads: a copy is "
            f"{copy / fused:.2f} times as fast (1.5 would call for a kernel of our own)"
        )
    if "layers" in row:
        return (
            f"{name:<10} {row['layers']} layers ({row['expected_layers']} predicted), {count(row['parameters'])} parameters "
            f"under {row['cap_gb']:g} GB  whole {row['whole_seconds']:.0f} s"
        )
    disk = f"  disk {bytes_(row['disk_bytes_per_second'])}/s" if "disk_bytes_per_second" in row else ""
    return (
        f"{name:<10} {1e3 * row['step_seconds']:9.1f} ms  {row['tokens_per_second']:10,.0f} tokens/s  {bytes_(row['peak_bytes'])}"
        f"  loss {row['loss']:.4f}{disk}  start {row['start_seconds']:.0f} s, first step {row['first_step_seconds']:.0f} s, "
        f"whole {row['whole_seconds']:.0f} s"
    )


def compared(rows: dict[str, Row]) -> None:
    """Print what the rows say together."""
    for name in ("fit-host", "fit-layers"):
        if "fit-device" in rows and name in rows and rows["fit-device"]["parameters"]:
            print(f"{name}: {rows[name]['parameters'] / rows['fit-device']['parameters']:.1f} times the parameters")
    if "device" not in rows:
        return
    alone = rows["device"]["step_seconds"]
    for name in ("host", "delayed", "disk", "tiles", "layers", "infinity"):
        if name in rows:
            print(f"{name}: {alone / rows[name]['step_seconds']:.1%} of the speed with state on the device", end="")
            if name == "disk":  # the model of state alone
                tokens = rows[name]["tokens_per_second"] * rows[name]["step_seconds"]
                reached = 6 * rows[name]["parameters"] * tokens / alone
                model = efficiency(state_intensity(round(tokens)), rows[name]["disk_bytes_per_second"], reached)
                print(f"; {model:.1%} by ZeRO-Infinity's model", end="")
            print(flush=True)


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--out", type=Path, help="JSON that every call adds to")
    parser.add_argument("--numbers", type=int, default=100_000_000, help="of adam")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path("offload"), help="of disk")
    parser.add_argument("--cap", type=float, default=8.0, help="GB of fit")
    parser.add_argument("--patience", type=float, default=240, help="seconds of a case")
    parser.add_argument("--tiny", action="store_true")
    call = parser.parse_args()
    shape = TINY if call.tiny else LLAMA
    print(f"torch {torch.__version__}, {device_name()}, {take_cores()} threads", flush=True)
    plans = {
        "device": ParallelPlan(),
        "host": ParallelPlan(offload="cpu"),
        "delayed": ParallelPlan(offload="cpu", offload_delay=True),
        "disk": ParallelPlan(offload="disk", offload_folder=str(call.folder)),
        "tiles": ParallelPlan(offload="cpu", offload_tiles=4),
        "layers": ParallelPlan(offload="cpu", offload_weights="cpu"),
        "infinity": ParallelPlan(
            offload="disk", offload_gradients="disk", offload_weights="disk", offload_folder=str(call.folder)
        ),
    }
    cases = {"adam": partial(adam, call.numbers)}
    cases |= {name: partial(step, plan, shape, call) for name, plan in plans.items()}
    cases |= {f"fit-{name}": partial(fit, plans[name], shape, call) for name in ("device", "host", "layers")}
    compared(in_turns(cases, only=call.only, patience=call.patience, out=call.out, show=line))


if __name__ == "__main__":
    main()
