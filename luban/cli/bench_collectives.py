"""`luban bench collectives`: communication between processes, counted and timed."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luban.cli.launch import launch
from luban.core.arguments import parse, without_processes
from luban.core.errors import UsageError, nearest
from luban.core.log import print_result, say
from luban.core.units import bytes_, milliseconds

if TYPE_CHECKING:
    from luban.parallel.bench import Row

ABOUT = """Run each collective as an algorithm over point-to-point sends, count the bytes that a process sends beside the
formula, and time it beside the same collective of NCCL or Gloo; results are compared.

bus is the bandwidth of a link as nccl-tests defines it, so that collectives and numbers of processes can be compared.
--fit fits alpha and beta of the backend's ring all-reduce to every second size, and shows what closed form, fluid rates and
packets predict for all sizes and for the other collectives beside what was measured (NCCL_ALGO=Ring and NCCL_PROTO=Simple unless they
are set: each of NCCL's protocols has an alpha and a beta of its own).
torchrun --nproc-per-node N -m luban bench collectives … starts the same, on several machines too."""
EXAMPLES = """
luban bench collectives --nproc 4
luban bench collectives --nproc 2 --sizes 64k 1M 16M --collectives all_reduce all_gather
luban bench collectives --nproc 4 --sizes 256M --collectives all_reduce --repeats 20 --json ring.json
luban bench collectives --nproc 2 --fit --device cuda --repeats 20 --json fit.json
luban bench collectives --nproc 2 --fit --device cpu --sizes 256k 512k 1M 2M 4M
"""
DEFAULT = ("64k", "1M", "16M")
FITTED = {
    "cpu": ("64k", "128k", "256k", "512k", "1M", "2M", "4M", "8M"),
    "cuda": ("1M", "2M", "4M", "8M", "16M", "32M", "64M", "128M", "256M", "512M", "1G"),
}
PREDICTED = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
WANTED = 0.15  # of an all-reduce's time, that a prediction may be off
UNITS = {"": 0, "k": 10, "m": 20, "g": 30}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    nproc: int = 2  # processes of this machine, each on a device of its own
    # bytes of the whole tensor: 4096, 64k, 256M, 1G (k = 1024); none: 64k 1M 16M, with --fit 1M to 1G, on a CPU 64k to 8M
    sizes: tuple[str, ...] = ()
    collectives: tuple[str, ...] = ()  # which ones; none: all
    repeats: int = 5  # timed runs of each, of which the median counts
    fit: bool = False  # fit alpha and beta, and compare predictions
    pieces: int = 2  # that the ring cuts its messages into
    lanes: int = 1  # process groups that the pieces take turns in, so that messages overlap
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if available
    json: Path | None = None  # the rows as JSON


def run(argv: Sequence[str]) -> int:
    """Measure in several processes and print the table."""
    args = parse(Arguments, argv, verb="bench collectives", about=ABOUT, examples=EXAMPLES)
    import torch.distributed as dist

    from luban.core.plan import ParallelPlan
    from luban.parallel.bench import COLLECTIVES, measure, table
    from luban.parallel.device import choose_device
    from luban.parallel.world import World, process_count

    for name in args.collectives:
        if name not in COLLECTIVES:
            raise UsageError(f"unknown collective '{name}'{nearest(name, COLLECTIVES)}")
    names = args.collectives or (PREDICTED if args.fit else tuple(COLLECTIVES))
    if args.fit and not {"all_reduce"} <= set(names) <= set(PREDICTED):
        raise UsageError(f"--fit needs all_reduce, and predicts {', '.join(PREDICTED)}")
    given = [_bytes(text) for text in args.sizes]
    if args.fit and given and len(set(given)) < 4:
        raise UsageError("--fit needs four sizes at least: two constants are fitted to every second one")
    if min(args.repeats, args.pieces, args.lanes) < 1 or args.nproc < 2:
        raise UsageError(
            "--repeats, --pieces and --lanes must be at least 1, and --nproc at least 2: collectives need others"
        )
    if process_count() == 1:
        return launch(["bench", "collectives", *without_processes(argv)], args.nproc)
    if args.fit:
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NCCL_PROTO", "Simple")
    device = choose_device(args.device)
    world = World.join(ParallelPlan(replicate=process_count()), device)
    more = [group for _ in range(args.lanes - 1) if isinstance(group := dist.new_group(), dist.ProcessGroup)]
    sizes = given or [_bytes(text) for text in (FITTED[device.type] if args.fit else DEFAULT)]
    done = _progress(len(sizes)) if world.is_main else None
    rows = measure(names, sizes, device, repeats=args.repeats, pieces=args.pieces, more=more, done=done)
    if world.is_main:
        print_result(table(rows, world.size))
        found: object = [{**asdict(row), "share": row.share, "processes": world.size} for row in rows]
        if args.fit:
            say("predicting by closed form, fluid rates and packets")
            predictions = _predictions(rows, world.size)
            print_result("\n".join(_prediction_lines(predictions)))
            found = {"rows": found, **predictions}
        if args.json is not None:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    World.leave()
    return 0


def _progress(sizes: int) -> Callable[[Sequence[Row]], None]:
    """Says after each of so many sizes what it took."""
    number = itertools.count(1)

    def done(rows: Sequence[Row]) -> None:
        times = ", ".join(f"{row.collective} {milliseconds(row.peer_seconds)}" for row in rows)
        say(f"size {next(number)} of {sizes}, {bytes_(rows[0].bytes)}: {times} over {rows[0].peer}")

    return done


def _predictions(rows: Sequence[Row], processes: int) -> dict[str, Any]:
    """Constants fitted to every second all-reduce of the backend, and for each row the seconds predicted in three ways."""
    from luban.planner.collective_times import fit

    reduces = sorted((row.bytes, row.peer_seconds) for row in rows if row.collective == "all_reduce")
    fitted = reduces[::2]
    links = fit(processes, *zip(*fitted, strict=True))
    found = [
        {
            "collective": row.collective,
            "bytes": row.bytes,
            "fitted": row.collective == "all_reduce" and row.bytes in dict(fitted),
            "measured": row.peer_seconds,
            "closed form": links.closed_form(row.collective, row.bytes),
            "fluid": links.fluid(row.collective, row.bytes),
            "packets": links.packets(row.collective, row.bytes),
        }
        for row in rows
    ]
    return {
        "backend": rows[0].peer,
        "alpha_seconds": links.alpha,
        "beta_seconds_a_byte": links.beta,
        "predictions": found,
    }


def _prediction_lines(found: dict[str, Any]) -> list[str]:
    """The fit, a line for each collective and size, and the sizes that were fitted and checked, and the
    largest error of an all-reduce that wasn't fitted."""
    ways = ("closed form", "fluid", "packets")
    alpha, rate = 1e6 * found["alpha_seconds"], 1e-9 / found["beta_seconds_a_byte"]
    lines = [
        "",
        f"{found['backend']}: alpha {alpha:.2f} µs a message, 1/beta {rate:.3g} GB/s, fitted to the all-reduces marked *",
    ]
    lines.append(f"{'collective':<16}{'size':>10}{'measured':>14}" + "".join(f"{way:>22}" for way in ways))
    worst = dict.fromkeys(ways, 0.0)
    for row in found["predictions"]:
        cells = ""
        for way in ways:
            error = row[way] / row["measured"] - 1
            if row["collective"] == "all_reduce" and not row["fitted"]:
                worst[way] = max(worst[way], abs(error))
            cells += f"{f'{milliseconds(row[way])} ({error:+.0%})':>22}"
        mark = "*" if row["fitted"] else ""
        lines.append(
            f"{row['collective'] + mark:<16}{bytes_(row['bytes']):>10}{milliseconds(row['measured']):>14}{cells}"
        )
    reduces = [row for row in found["predictions"] if row["collective"] == "all_reduce"]
    fitted, checked = (
        ", ".join(bytes_(row["bytes"]) for row in reduces if row["fitted"] is which) for which in (True, False)
    )
    lines.append(f"all-reduces: fitted to {fitted}; checked at {checked}")
    said = ", ".join(f"{way} {error:.1%}" for way, error in worst.items())
    verdict = "within" if max(worst.values()) <= WANTED else "NOT within"
    lines.append(f"largest error of an all-reduce that was not fitted: {said}; {verdict} {WANTED:.0%}")
    return lines


def _bytes(text: str) -> int:
    """64k → 65,536. Raises UsageError for what is no size."""
    found = re.fullmatch(r"(\d+)\s*([kmg]?)(i?b)?", text.strip().lower())
    if found is None or not int(found[1]):
        raise UsageError(f"--sizes takes bytes such as 4096, 64k, 256M or 1G; {text!r} given")
    return int(found[1]) << UNITS[found[2]]
