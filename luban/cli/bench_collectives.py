"""`luban bench collectives`: communication between processes, counted and timed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from luban.cli.launch import launch
from luban.core.arguments import parse, without_processes
from luban.core.errors import UsageError, nearest
from luban.core.log import print_result

ABOUT = """Run each collective as an algorithm over point-to-point sends, count the bytes that a process sends beside the
formula, and time it beside the same collective of NCCL or Gloo; results are compared.

bus is the bandwidth of a link as nccl-tests defines it, so that collectives and numbers of processes can be compared.
torchrun --nproc-per-node N -m luban bench collectives … starts the same, on several machines too."""
EXAMPLES = """
luban bench collectives --nproc 4
luban bench collectives --nproc 2 --sizes 64k 1M 16M --collectives all_reduce all_gather
luban bench collectives --nproc 4 --sizes 256M --collectives all_reduce --repeats 20 --json ring.json
"""
UNITS = {"": 0, "k": 10, "m": 20, "g": 30}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    nproc: int = 2  # processes of this machine, each on a device of its own
    sizes: tuple[str, ...] = ("64k", "1M", "16M")  # bytes of the whole tensor: 4096, 64k, 256M, 1G (k = 1024)
    collectives: tuple[str, ...] = ()  # which ones; none: all
    repeats: int = 5  # timed runs of each, of which the median counts
    pieces: int = 2  # that the ring cuts its messages into
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if available
    json: Path | None = None  # the rows as JSON


def run(argv: Sequence[str]) -> int:
    """Measure in several processes and print the table."""
    args = parse(Arguments, argv, verb="bench collectives", about=ABOUT, examples=EXAMPLES)
    from luban.core.plan import ParallelPlan
    from luban.parallel.bench import COLLECTIVES, measure, table
    from luban.parallel.device import choose_device
    from luban.parallel.world import World, process_count

    for name in args.collectives:
        if name not in COLLECTIVES:
            raise UsageError(f"unknown collective '{name}'{nearest(name, COLLECTIVES)}")
    sizes = [_bytes(text) for text in args.sizes]
    if min(args.repeats, args.pieces) < 1 or args.nproc < 2:
        raise UsageError("--repeats and --pieces must be at least 1, and --nproc at least 2: collectives need others")
    if process_count() == 1:
        return launch(["bench", "collectives", *without_processes(argv)], args.nproc)
    device = choose_device(args.device)
    world = World.join(ParallelPlan(replicate=process_count()), device)
    names = args.collectives or tuple(COLLECTIVES)
    rows = measure(names, sizes, device, repeats=args.repeats, pieces=args.pieces)
    if world.is_main:
        print_result(table(rows, world.size))
        if args.json is not None:
            found = [{**asdict(row), "share": row.share, "processes": world.size} for row in rows]
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    World.leave()
    return 0


def _bytes(text: str) -> int:
    """64k → 65,536. Raises UsageError for what is no size."""
    found = re.fullmatch(r"(\d+)\s*([kmg]?)(i?b)?", text.strip().lower())
    if found is None or not int(found[1]):
        raise UsageError(f"--sizes takes bytes such as 4096, 64k, 256M or 1G; {text!r} given")
    return int(found[1]) << UNITS[found[2]]
