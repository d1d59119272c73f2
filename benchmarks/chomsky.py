"""The Chomsky hierarchy benchmark: 15 tasks, recurrent networks with different memories, Transformers with different positions.

Prints accuracy at the test lengths, of the best seed, beside the published one (Delétang et al. 2023, table 2), and that seed's at the
lengths of training. --out DIR keeps results and, every minute, the state of what is being trained: the same command goes on where
it was stopped, and one with more --steps or --seconds (of all commands together) trains on. `luban eval DIR/TASK-MODEL chomsky
--out …` measures a model again.

    python benchmarks/chomsky.py --tasks parity --models rnn lstm transformer --short --seconds 60
    python benchmarks/chomsky.py --device cuda --jobs 8 --short --out runs/chomsky              # every task and model
    python benchmarks/chomsky.py --tasks reverse_string --models transformer_sinusoidal transformer_random_sinusoidal --device cuda
    python benchmarks/chomsky.py --tasks bucket_sort --models transformer_relative transformer_random_relative --seeds 2 --longest 10 \
        --test-to 50 --width 32 --layers 2 --batch 32 --position-range 128 --steps 1000               # minutes on a CPU
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from pathlib import Path

import torch

from luban.core.errors import ConfigError, LubanError
from luban.evals.chomsky.models import MODELS
from luban.evals.chomsky.protocol import Protocol, accuracies, read_protocol, save, train
from luban.evals.chomsky.state import refuse_other
from luban.evals.chomsky.tasks import TASKS

SHORT = {"steps": 10_000, "test_to": 100, "test_step": 3, "width": 64}  # a tenth of the lengths, a quarter of the width


def measure(protocol: Protocol, device: str, out: str) -> dict:
    """One task and model: trained, measured and kept. What is kept for fewer steps or seconds is trained on."""
    folder = Path(out) / f"{protocol.task}-{protocol.model}" if out else None
    if folder is not None and (folder / "result.json").exists():
        kept = read_protocol(folder)
        refuse_other(kept.told(), protocol.told(), folder)
        if kept == protocol:
            return json.loads((folder / "result.json").read_text())
    models, steps = train(protocol, device, folder)
    by_seed = [sum(each) / len(each) for each in accuracies(models, protocol)]
    best = max(range(len(by_seed)), key=by_seed.__getitem__)
    (trained,) = accuracies([models[best]], protocol, range(1, protocol.longest + 1))
    row = {
        "task": protocol.task,
        "model": protocol.model,
        "accuracy": by_seed[best],
        "trained": sum(trained) / len(trained),
        "seeds": by_seed,
        "steps": steps,
    }
    if folder is not None:
        save(models[best], protocol, folder)
        (folder / "result.json").write_text(json.dumps(row, indent=1) + "\n")
    return row


def threads_of(jobs: int) -> int:
    """Of each of so many jobs: as many as OMP_NUM_THREADS says, else the processors divided among them."""
    return int(os.environ.get("OMP_NUM_THREADS") or max((os.cpu_count() or 1) // jobs, 1))


def prepare(threads: int) -> None:
    """Set up a process that trains. Ctrl-C, which reaches all processes, ends it without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=["rnn", "stack_rnn", "tape_rnn", "transformer", "lstm"]
    )
    parser.add_argument("--short", action="store_true", help="lengths to 100, width 64, 10,000 steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of training, at most")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--longest", type=int, default=40, help="length in training; tests begin behind it")
    parser.add_argument("--test-to", type=int, help="longest length of tests")
    parser.add_argument("--test-step", type=int, help="every so many lengths")
    parser.add_argument("--width", type=int, help="of the model")
    parser.add_argument("--layers", type=int, help="of Transformers")
    parser.add_argument("--lr", type=float, help="of Adam")
    parser.add_argument("--position-range", type=int, help="positions that randomised ones are drawn from")
    parser.add_argument("--computation", type=int, help="steps between input and answer for every token of the input")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of training, at most, a task and model")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="trained at once")
    parser.add_argument("--out", default="", help="folder for results and trainings")
    args = parser.parse_args()
    if args.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, {args.jobs} given")
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise ConfigError(f"--out: {args.out} is a file, and a folder is needed")
    if args.position_range is not None and not any("random_" in model for model in args.models):
        raise ConfigError("--position-range is of models with randomised positions, transformer_random_…")
    threads = threads_of(args.jobs)
    names = {field.name for field in fields(Protocol)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    settings = (SHORT if args.short else {}) | given | {"test_from": args.longest + 1}
    planned = [Protocol(task=task, model=model, **settings) for task in args.tasks for model in args.models]
    base = planned[0]
    print(
        f"torch {torch.__version__}, {args.device}, {threads} threads each; accuracy at {base.test_from}–{base.test_to} in %, trained: at "
        f"1–{base.longest}"
    )
    print(f"{'task':24} {'model':30} {'measured':>8} {'published':>9} {'trained':>7}  seeds, steps")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, prepare, (threads,)) as pool:
        for row in pool.map(measure, planned, [args.device] * len(planned), [args.out] * len(planned)):
            published = TASKS[row["task"]].published.get(row["model"])
            seeds = " ".join(f"{100 * each:.1f}" for each in row["seeds"])
            shown = "" if published is None else f"{published:.1f}"
            print(
                f"{row['task']:24} {row['model']:30} {100 * row['accuracy']:8.1f} {shown:>9} {100 * row.get('trained', float('nan')):7.1f}  {seeds}, "
                f"{row['steps']}",
                flush=True,
            )


if __name__ == "__main__":
    try:
        main()
    except LubanError as error:
        sys.exit(f"chomsky.py: {error}")
    except (KeyboardInterrupt, BrokenProcessPool):
        sys.exit("chomsky.py: stopped; with --out the same command goes on from at most a minute before")
