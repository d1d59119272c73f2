"""Where a GPU's time goes in a step: kernels by name, and where it waits."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def kernel_table(step: Callable[[], object], steps: int = 3, warm: int = 3) -> str:
    """Where the device's time goes in `steps` steps without a pause, after `warm` others: kernels by name, and where it
    waits."""
    for _ in range(warm):
        step()  # power and clocks settle under load
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        trace.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    work = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"])
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    )
    if not work:
        return "no kernels\n"
    spans: dict[str, list[float]] = {}
    waits: dict[tuple[str, str], list[float]] = {}
    end, before, busy = work[0][0], "", 0.0
    for start, stop, name in work:
        spans.setdefault(name, []).append(stop - start)
        if start > end and before:
            waits.setdefault((before[:60], name[:60]), []).append(start - end)
        busy += max(0.0, stop - max(start, end))
        end, before = max(end, stop), name
    whole = end - work[0][0]
    lines = [
        f"{steps} steps: {whole / steps / 1e3:.1f} ms each, {len(work) // steps} kernels, busy {100 * busy / whole:.1f}%",
        *messages(work, steps),
        "ms a step   calls   µs each   kernel",
    ]
    for name, found in sorted(spans.items(), key=lambda item: -sum(item[1])):
        lines.append(
            f"{sum(found) / steps / 1e3:9.2f} {len(found) / steps:7.0f} {statistics.fmean(found):9.1f}   {name[:150]}"
        )
    lines.append("ms a step   times   µs each   waits between kernels")
    for (a, b), found in sorted(waits.items(), key=lambda item: -sum(item[1]))[:40]:
        lines.append(
            f"{sum(found) / steps / 1e3:9.2f} {len(found) / steps:7.0f} {statistics.fmean(found):9.1f}   {a} → {b}"
        )
    return "\n".join(lines) + "\n"


def messages(work: list[tuple[float, float, str]], steps: int) -> list[str]:
    """How long the device sends, and how long it does nothing else; nothing where it doesn't send.

    Args:
        work: (start, end, name) of kernels in µs, in order.
    """
    sending = [(start, stop) for start, stop, name in work if name.startswith("ncclDevKernel")]
    if not sending:
        return []
    computing = [(start, stop) for start, stop, name in work if not name.startswith("ncclDevKernel")]
    either, alone = covered(sorted(sending + computing)), covered(computing)
    ms = [t / steps / 1e3 for t in (covered(sending), either - alone)]
    return [f"messages {ms[0]:.1f} ms a step, {ms[1]:.1f} of them beside no other kernel"]


def covered(spans: list[tuple[float, float]]) -> float:
    """The time that lies in at least one of the spans, which are in order of their starts."""
    total, end = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
