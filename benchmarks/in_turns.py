"""Cases of one benchmark, one after another in one process: each within its own time, printed as it ends, kept in a file.

One process, so that libraries are loaded once; what torch compiled stays in its cache on disk.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]


class TookTooLong(BaseException):
    """A case didn't end within its time; no Exception, which libraries catch."""


def in_turns(
    cases: Mapping[str, Callable[[], Row]],
    *,
    only: Iterable[str] | None,
    patience: float,
    out: Path | None,
    show: Callable[[str, Row], str],
) -> dict[str, Row]:
    """Run the cases in order, print a line for each, and return their rows; those that `out` has already are shown from there.

    Args:
        only: names of cases to run, in this order; None: all.
        patience: seconds after which a case is given up.
        out: JSON of the rows by name, written after every case. A case that failed is tried again by the next call.
        show: the line of a row.
    """
    chosen = list(only) if only else list(cases)
    if unknown := [name for name in chosen if name not in cases]:
        raise SystemExit(f"no case {', '.join(unknown)}: there are {', '.join(cases)}")
    rows: dict[str, Row] = json.loads(out.read_text()) if out and out.exists() else {}
    for name in chosen:
        if name in rows:
            print(f"{show(name, rows[name])}  (from {out})", flush=True)
            continue
        began = time.perf_counter()
        try:
            with within(patience):
                row = cases[name]()
        except (Exception, TookTooLong) as error:
            said = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
            print(f"{name}: failed after {time.perf_counter() - began:.0f} s: {said}", flush=True)
            row = None
        if row is not None:
            row |= {"device": device_name(), "torch": torch.__version__, "whole_seconds": time.perf_counter() - began}
            rows[name] = row
            print(show(name, row), flush=True)
        if row is not None and out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(rows, indent=1))
        forget()
    return rows


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise TookTooLong where what is inside hasn't ended after so many seconds."""

    def late(*_: object) -> None:
        raise TookTooLong(f"more than {seconds:g} s (--patience)")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forget() -> None:
    """Free what the last case left: its engine, compiled code in memory, blocks of the allocator."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()
        if (left := torch.cuda.memory_allocated()) > 2**28:
            print(f"({left / 1e9:.1f} GB are still allocated)", flush=True)


def take_cores() -> int:
    """Let torch use the cores that this process may run on, where it would start a thread for each of the machine's; their
    number."""
    cores = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists() and (words := quota.read_text().split())[0] != "max":
        cores = min(cores, max(int(words[0]) // int(words[1]), 1))
    torch.set_num_threads(min(cores, torch.get_num_threads()))
    return torch.get_num_threads()


def device_name() -> str:
    """Of the GPU, or CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
