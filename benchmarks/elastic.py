"""Random kills of an elastic run's workers, its service and its agent: is every sample used once, are the weights those of an
uninterrupted run, how long until training goes on, does anything hang.

    python benchmarks/elastic.py --kills 20 --runs 1
    python benchmarks/elastic.py --kills 20 --runs 10 --parallel 5 --out FILE.json    # on 16 cores
    python benchmarks/elastic.py --kills 20 --runs 10 --workers 2 --plan.shard 2 --out FILE.json

A small decoder trains on random text with --nproc WORKERS over Gloo. Each kill is a SIGKILL at a random moment; half of them hit
a worker, a quarter the service, a quarter the agent, which is started again by the same command as a person would. The
next kill waits until training has gone on. Recovery is counted from the kill to the next step that is finished after it, the
start of a replacement included. --parallel lets so many runs go on at once: two workers, an agent, a service and a spare
that imports torch are busy in each, so that three cores a run or more keep them apart. Weights are compared with those of one run without kills by their hash.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from luban.core.artifact import as_parent, open_artifact
from luban.corpus.build import build_corpus
from luban.corpus.reader import read_corpus
from luban.data.pack import pack
from luban.tokenizer.train import train_tokenizer
from luban.train.elastic.agent import folder_of
from luban.train.elastic.processes import Process

HUNG = 120.0  # seconds without a step after which a run counts as hung
SECONDS_A_KILL = 2.5  # of training between two kills, without recovery
KINDS = ("worker", "worker", "service", "agent")
RECIPE = """
[model]
width = 64
layers = 3
context = 64
tied_head = true
layer = {{ mixer = {{ type = "grouped", heads = 4, kv_heads = 2 }}, feedforward = {{ type = "swiglu", width = 128 }} }}

[schedule]
warmup = 5

[train]
steps = {steps}
batch_size = 12
seq_len = 64
device = "cpu"
log_every = 1

[checkpoint]
every = 50

[validation]
every = 200
batches = 1
"""


def main() -> None:
    """Measure and print a summary; --out keeps every kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="of each run")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=1, help="runs at once")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=0, help="of each run (0: 2.5 s of them a kill, by their measured time)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--out", type=Path, help="JSON with every kill, written after each run")
    args, plan = parser.parse_known_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(folder)

        def command(steps: int) -> list[str]:
            recipe = folder / f"{steps}.toml"
            recipe.write_text(RECIPE.format(steps=steps))
            return ["pretrain", str(recipe), "--data.path", str(shards), "--nproc", str(args.workers), *plan]

        steps = args.steps or enough_steps(undisturbed(command(60), folder / "short"), args.kills)
        wanted = weights_of(undisturbed(command(steps), folder / "calm"))
        found: list[dict] = []

        def one(number: int) -> dict:
            out = folder / f"run{number}"
            result = Killed(command(steps), out, args.workers, random.Random(f"{args.seed} {number}")).run(args.kills)
            result |= audit(out, steps * 12) if result["finished"] else {}
            result["weights_equal"] = result["finished"] and weights_of(out) == wanted
            if result["finished"]:
                shutil.rmtree(out)
            return {"run": number, **result}

        with ThreadPoolExecutor(max(args.parallel, 1)) as pool:
            for future in as_completed([pool.submit(one, number) for number in range(args.runs)]):
                found.append(future.result())
                print(json.dumps({k: v for k, v in found[-1].items() if k != "kills"}), flush=True)
                if args.out:
                    kept = {"summary": summary(found, args, plan, steps), "runs": found}
                    args.out.write_text(json.dumps(kept, indent=1))
        print(json.dumps(summary(found, args, plan, steps), indent=1))


def undisturbed(command: list[str], out: Path) -> Path:
    """A finished run without anything elastic."""
    if luban(command, out).wait():
        raise SystemExit(log_of(out).read_text())
    return out


def enough_steps(run: Path, kills: int) -> int:
    """Steps that last long enough for so many kills, by the median step of a short run."""
    return max(round(SECONDS_A_KILL * kills / open_artifact(run, "run").figures["step_seconds"]), 40 * max(kills, 5))


def summary(found: list[dict], args: argparse.Namespace, plan: list[str], steps: int) -> dict:
    """Over all runs."""
    kills = [kill for run in found for kill in run["kills"]]
    kinds = {kind: sorted(kill["seconds"] for kill in kills if kill["kind"] == kind) for kind in dict.fromkeys(KINDS)}
    return {
        "kills": len(kills),
        "runs": len(found),
        "finished": sum(run["finished"] for run in found),
        "every_row_once": sum(run.get("every_row_once", False) for run in found),
        "weights_equal": sum(run["weights_equal"] for run in found),
        "hung": sum(run["hung"] for run in found),
        "recovery_seconds": {
            kind: {
                "kills": len(s),
                "median": round(statistics.median(s), 2),
                "p90": round(s[min(len(s) * 9 // 10, len(s) - 1)], 2),
                "max": round(s[-1], 2),
                "within_15": sum(x <= 15 for x in s),
            }
            for kind, s in {"all": sorted(kill["seconds"] for kill in kills), **kinds}.items()
            if s
        },
        "parallel": args.parallel,
        "steps": steps,
        "workers": args.workers,
        "plan": plan,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


class Killed:
    """One run whose processes are killed.

    Args:
        workers: of the run.
        draw: the moments and victims.
    """

    def __init__(self, command: list[str], out: Path, workers: int, draw: random.Random):
        self.command = [*command, "--elastic.enabled", "true"]
        self.out, self.workers, self.draw = out, workers, draw
        self.elastic = folder_of(out)
        self.agent = luban(self.command, out)
        self.hung = False

    def run(self, wanted: int) -> dict:
        """Kill so many, then let the run finish."""
        kills: list[dict] = []
        self._wait_for(self._step() + 3)
        while len(kills) < wanted and not self.hung and not self.out.exists() and self.agent.poll() is None:
            time.sleep(self.draw.uniform(0, 2))
            kind = self.draw.choice(KINDS)
            step, began = self._step(), time.monotonic()
            if not self._kill(kind):
                continue
            if not self._wait_for(step + 1):
                break
            kills.append({"kind": kind, "step": step, "seconds": round(time.monotonic() - began, 3)})
        code = self._finish()
        return {"finished": code == 0, "hung": self.hung, "kills": kills, "count": len(kills)}

    def _kill(self, kind: str) -> bool:
        """Whether there was somebody to kill."""
        if kind == "agent":
            self.agent.kill()
            self.agent.wait()
            self.agent = luban(self.command, self.out)
            return True
        name = "service.pid.json"
        if kind == "worker":
            names = [path.name for path in self.elastic.glob("worker-*.json")]
            name = self.draw.choice(sorted(names))
        try:
            found = json.loads((self.elastic / name).read_text())
        except (OSError, ValueError):
            return False
        process = Process(found["pid"], found["started"])
        alive = process.alive()
        process.signal(signal.SIGKILL)
        return alive

    def _step(self) -> int:
        """Steps that all workers of a generation have finished."""
        if not (self.elastic / "service.db").exists():
            return 0
        database = sqlite3.connect(f"file:{self.elastic / 'service.db'}?mode=ro", uri=True, timeout=10)
        try:
            rows = database.execute("SELECT step, done FROM steps ORDER BY step DESC LIMIT 5").fetchall()
        except sqlite3.OperationalError:
            return 0
        finally:
            database.close()
        return next((step + 1 for step, done in rows if len(json.loads(done)) == self.workers), 0)

    def _wait_for(self, step: int) -> bool:
        began = time.monotonic()
        while self._step() < step:
            if self.out.exists() or self.agent.poll() is not None:
                return False
            if time.monotonic() - began > HUNG:
                self.hung = True
                return False
            time.sleep(0.02)
        return True

    def _finish(self) -> int | None:
        """The exit code of the last agent; None: it hung and was killed with all others."""
        try:
            return self.agent.wait(timeout=3600 if not self.hung else 1)
        except subprocess.TimeoutExpired:
            self.hung = True
            print(log_of(self.out).read_text()[-5000:], file=sys.stderr)
            self.agent.kill()
            return None


def luban(command: list[str], out: Path) -> subprocess.Popen:
    """The running command; what it says goes into a file."""
    words = [sys.executable, "-m", "luban", *command, "--out", str(out)]
    with open(log_of(out), "a") as log:
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log)


def log_of(out: Path) -> Path:
    """What the processes of a run have said."""
    return out.with_name(f"{out.name}.log")


def make_shards(folder: Path) -> Path:
    """Shards of words drawn at random."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 8))) for _ in range(500)]
    text = folder / "text"
    text.mkdir()
    for number in range(60):
        (text / f"{number}.txt").write_text(" ".join(draw.choices(words, k=1500)))
    build_corpus([str(text)], folder / "corpus", heldout=0.1)
    parents = (as_parent("corpus", folder / "corpus"),)
    train_tokenizer(
        (document.text for document in read_corpus(folder / "corpus")),
        folder / "tokenizer",
        vocab_size=400,
        parents=parents,
    )
    splits = {split: read_corpus(folder / "corpus", split) for split in ("train", "heldout")}
    pack(splits, folder / "tokenizer", folder / "shards", parents=parents)
    return folder / "shards"


def weights_of(run: Path) -> str:
    """The hash of the last checkpoint's weights."""
    last = open_artifact(run, "run").figures["checkpoints"]["last"]
    return open_artifact(run / "checkpoints" / last, "checkpoint").figures["weights_hash"]


def audit(run: Path, rows: int) -> dict:
    """What the service says of the rows, and where the seconds went."""
    figures = open_artifact(run, "run").figures
    used = figures["elastic"]["rows"]
    spent = figures["goodput"]
    return {
        "every_row_once": not used["wrong"] and used["rows"] == rows,
        "goodput": {kind: round(seconds / spent["wall"], 3) for kind, seconds in spent.items() if kind != "wall"},
        "generations": figures["elastic"]["generations"],
    }


if __name__ == "__main__":
    main()
