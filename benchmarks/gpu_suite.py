"""Every figure that docs have of GPUs, measured again: the commands of gpu_suite.toml with limits, and a table of how they ended.

    python benchmarks/gpu_suite.py --list
    python benchmarks/gpu_suite.py serve adapters --out figures
    python benchmarks/gpu_suite.py --gpus 1 --data FOLDER --out figures --seconds 560

Runs that measure times go one after another, then those that measure none together. What ended well is not run again by the same
command; --seconds stops before the next one that could not end in time. OUT/NAME.log has what a run said, OUT/suite.json how it
ended; a line is printed for each.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One command of the list; fields as there."""

    name: str
    seconds: float
    command: str
    gpus: int = 1
    together: bool = False

    def words(self, out: Path, data: Path | None, gpus: int) -> list[str]:
        """The command. Raises SystemExit where it needs data that isn't given."""
        if "{data}" in self.command and data is None:
            raise SystemExit(f"{self.name} needs --data FOLDER")
        words = shlex.split(self.command.format(data=data, out=out / self.name, gpus=gpus))
        return [sys.executable if word == "python" else word for word in words]


def listed() -> list[Run]:
    """The runs of gpu_suite.toml."""
    return [Run(**row) for row in tomllib.loads((HERE / "gpu_suite.toml").read_text())["run"]]


def start(run: Run, words: list[str], out: Path) -> subprocess.Popen:
    """The process, in a group of its own, its output in a file."""
    (out / run.name).mkdir(parents=True, exist_ok=True)
    path = f"{HERE.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    log = (out / f"{run.name}.log").open("w")
    return subprocess.Popen(
        words,
        stdout=log,
        stderr=subprocess.STDOUT,
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


def finish(run: Run, process: subprocess.Popen, began: float, limit: float, out: Path) -> dict:
    """How it ended; it is ended itself where `limit` seconds after `began` are over."""
    try:
        code = process.wait(max(1.0, began + limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        code = "over its limit"
    lines = [line for line in (out / f"{run.name}.log").read_text(errors="replace").splitlines() if line.strip()]
    return {"exit": code, "seconds": round(time.monotonic() - began, 1), "last": lines[-1][:300] if lines else ""}


def main() -> int:
    runs = listed()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *(run.name for run in runs)], help="of runs; none: all")
    parser.add_argument("--out", type=Path, help="folder of logs and results")
    parser.add_argument("--data", type=Path, help="folder of the files that some commands read")
    parser.add_argument("--gpus", type=int, default=1, help="of this machine: runs that need more are left out")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for everything")
    parser.add_argument("--list", action="store_true", help="print the commands")
    args = parser.parse_args()
    chosen = [run for run in runs if run.name in args.names or (not args.names and run.gpus <= args.gpus)]
    if args.list:
        for run in chosen:
            print(
                f"{run.name:15} {run.gpus} GPU{'s' if run.gpus > 1 else ' '} {run.seconds:5.0f} s{' together' if run.together else '         '}  {run.command}"
            )
        return 0
    if args.out is None:
        parser.error("--out is needed")
    out, data, began = args.out.resolve(), None if args.data is None else args.data.resolve(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "suite.json"
    ended: dict[str, dict] = json.loads(kept.read_text()) if kept.exists() else {}

    def note(run: Run, how: dict) -> None:
        ended[run.name] = how
        kept.write_text(json.dumps(ended, indent=1) + "\n")
        print(f"{run.name:15} exit {how['exit']}, {how['seconds']} s: {how['last']}", flush=True)

    left = [run for run in chosen if ended.get(run.name, {}).get("exit") != 0]
    for run in (run for run in left if not run.together):
        at = time.monotonic()
        if at - began + min(run.seconds, 60) > args.seconds:
            print(f"{run.name:15} not begun", flush=True)
            continue
        limit = min(run.seconds, args.seconds - (at - began))
        note(run, finish(run, start(run, run.words(out, data, args.gpus), out), at, limit, out))
    at = time.monotonic()
    shared = [(run, start(run, run.words(out, data, args.gpus), out)) for run in left if run.together]
    for run, process in shared:
        note(run, finish(run, process, at, min(run.seconds, args.seconds - (at - began)), out))
    return int(any(ended.get(run.name, {}).get("exit") != 0 for run in chosen))


if __name__ == "__main__":
    sys.exit(main())
