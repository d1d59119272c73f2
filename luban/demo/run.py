"""Runs the demo: one process a stage, resumed where it stopped, measured from outside."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from luban.core.artifact import MANIFEST, read_manifest, write_json
from luban.core.errors import ArtifactError, LubanError
from luban.core.log import say
from luban.core.units import bytes_, seconds
from luban.demo.life import CPU, Sizes, Stage, life, on_gpu

QUESTIONS = ("What does os.path.join do?", "Which module has OrderedDict?", "What does json.dumps do?")


class StageFailed(LubanError):
    """A stage that ended with an error, which it has printed itself."""


def demo(out: Path, seed: int, serve: bool) -> None:
    """Run the whole life under `out`, then serve the model, or answer three questions.

    A second call goes on where the first one stopped. Raises StageFailed, with the stage's exit code.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "stages.json").is_file():
        raise ArtifactError(f"{out} holds something that is not a demo: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    stages = life(out, _sizes(), seed)
    costs = _read_costs(out)
    _write_costs(out, costs)
    for number, stage in enumerate(stages, start=1):
        say(f"\n── {number}/{len(stages)} {stage.name}: {stage.about}")
        if (stage.out / MANIFEST).is_file():
            say("   done before")
            continue
        say(f"   $ luban {shlex.join(stage.command)}")
        _run_stage(stage, costs)
        _write_costs(out, costs)
    summary = summarise(out, costs)
    write_json(out / "summary.json", summary)
    report = out / "report.html"
    _call(["report", str(out), "--out", str(report)])
    say("\n" + _closing(summary))
    say(f"report     {report.resolve().as_uri()}")
    if serve:
        say("chat page  at the address below; Ctrl-C ends the server\n")
        _call(["serve", str(out / "sft")])
    else:
        asked = "\n/reset\n".join(QUESTIONS) + "\n"
        subprocess.run(_luban(["chat", str(out / "sft"), "--temperature", "0"]), input=asked, text=True, check=True)
        say(f"serve it   luban serve {out / 'sft'}")
        say(f"look it up luban rag search {out / 'index'} '{QUESTIONS[1]}'")


def _sizes() -> Sizes:
    import torch

    from luban.parallel.device import multiplies_bf16
    from luban.parallel.memory_limits import free_memory

    if torch.cuda.is_available():
        return on_gpu(free_memory(torch.device("cuda")))
    fast = multiplies_bf16(torch.device("cpu"))
    return CPU if fast else replace(CPU, training="fp32", precision="float32")


def _read_costs(out: Path) -> dict[str, dict[str, float]]:
    """Cost of each stage so far, by name, in order."""
    path = out / "stages.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return {row.pop("name"): row for row in rows}


def _write_costs(out: Path, costs: dict[str, dict[str, float]]) -> None:
    write_json(out / "stages.json", [{"name": name, **cost} for name, cost in costs.items()])


def _luban(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "luban", *words]


def _call(words: Sequence[str]) -> None:
    code = subprocess.run(_luban(words), check=False).returncode
    if code not in (0, 128 + signal.SIGINT):
        raise _failure(words[0], code)


def _failure(name: str, code: int) -> StageFailed:
    failure = StageFailed(f"the stage '{name}' ended with exit code {code}; the same command goes on from here")
    failure.exit_code = code if 0 < code < 256 else 1
    return failure


def _run_stage(stage: Stage, costs: dict[str, dict[str, float]]) -> None:
    """One stage as a process of its own; its wall time (over all tries) and peak memory go into `costs`."""
    began = time.monotonic()
    process = subprocess.Popen(_luban(stage.command))
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # the terminal has sent it to the stage too: let it save
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    before = costs.get(stage.name, {"seconds": 0.0, "peak_rss_bytes": 0})
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is kB on Linux
    costs[stage.name] = {
        "seconds": round(before["seconds"] + time.monotonic() - began, 2),
        "peak_rss_bytes": max(before["peak_rss_bytes"], usage.ru_maxrss * scale),
    }
    if code != 0:
        raise _failure(stage.name, code)
    say(f"   {seconds(costs[stage.name]['seconds'])}, peak memory {bytes_(costs[stage.name]['peak_rss_bytes'])}")


def summarise(out: Path, costs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The demo's figures under the names others read."""
    base = read_manifest(out / "eval-pretrain").figures
    tuned = read_manifest(out / "eval-sft").figures
    kept = {name: base[name] for name in ("bits_per_byte", "xz_bits_per_byte", "gzip_bits_per_byte", "heldout_bytes")}
    kept |= {name: tuned[name] for name in ("which_module_accuracy", "which_module_majority", "which_module_items")}
    found = read_manifest(out / "eval-index").figures
    kept |= {
        "which_module_found": found["retrieval_bm25_top_5"],
        "which_module_found_first": found["retrieval_bm25_top_1"],
    }
    return {
        **kept,
        "answer_loss_before": base["answer_loss"],
        "answer_loss_after": tuned["answer_loss"],
        "seconds": {name: cost["seconds"] for name, cost in costs.items()},
        "peak_rss_bytes": max((cost["peak_rss_bytes"] for cost in costs.values()), default=0),
    }


def _closing(summary: dict[str, Any]) -> str:
    drop = 1 - summary["answer_loss_after"] / summary["answer_loss_before"]
    rows = [
        (
            summary["bits_per_byte"] < summary["xz_bits_per_byte"],
            "bits per byte",
            f"{summary['bits_per_byte']:.3f}   (xz -9e {summary['xz_bits_per_byte']:.3f}, "
            f"gzip -9 {summary['gzip_bits_per_byte']:.3f})",
        ),
        (
            drop >= 0.2,
            "answer loss",
            f"{summary['answer_loss_before']:.3f} → {summary['answer_loss_after']:.3f}   ({drop:.0%} lower)",
        ),
        (
            summary["which_module_accuracy"] >= 2 * summary["which_module_majority"],
            "which module",
            f"{summary['which_module_accuracy']:.1%}   (best constant answer {summary['which_module_majority']:.1%})",
        ),
        (
            summary["which_module_found"] >= 0.9,
            "looked up",
            f"{summary['which_module_found']:.1%}   (right docstring among the first five; first {summary['which_module_found_first']:.1%})",
        ),
        (True, "wall time", seconds(sum(summary["seconds"].values()))),
        (True, "peak memory", bytes_(summary["peak_rss_bytes"])),
    ]
    return "\n".join(f"{'✓' if good else '✗'} {name:<14} {text}" for good, name, text in rows)
