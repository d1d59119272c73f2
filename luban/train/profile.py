"""A trace of a few steps for `--train.profile`: what ran when, on host and device, in a file that browsers open."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from luban.core.artifact import atomic_write
from luban.core.log import say, warn
from luban.core.whole_directory import INCOMPLETE

FOLDER = "profile"  # inside a run
SKIPPED = 3  # first steps after a start or resume: they compile, and fill the allocator's pools
LONGEST = 30  # rows of the table


class Profile:
    """Traces `steps` steps after the first ones.

    The loop asks `begins` before a step is submitted; once `complete`, it lets every submitted step end and calls `write`.
    """

    def __init__(self, run: Path, steps: int, device: torch.device):
        self.folder, self.steps, self.device = run / FOLDER, steps, device
        self.submitted = 0  # steps since the start or resume
        self.trace: torch.profiler.profile | None = None  # while it records
        self.first = 0  # step that it began with

    def begins(self, step: int) -> None:
        """Step number `step` is about to be submitted."""
        self.submitted += 1
        if self.submitted == SKIPPED + 1:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
            self.trace, self.first = torch.profiler.profile(activities=activities), step
            self.trace.start()

    @property
    def complete(self) -> bool:
        """True if the last step to be traced has been submitted."""
        return self.trace is not None and self.submitted >= SKIPPED + self.steps

    def write(self) -> None:
        """End the trace and write it, with a table of what took longest."""
        assert self.trace is not None
        self.trace.stop()
        trace, self.trace = self.trace, None
        last = self.first + min(self.submitted - SKIPPED, self.steps) - 1
        self.folder.mkdir(exist_ok=True)
        name = f"steps_{self.first:06d}_{last:06d}"
        trace.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = trace.key_averages().table(sort_by=by, row_limit=LONGEST, max_name_column_width=90)
        atomic_write(self.folder / f"{name}.txt", table)
        shown = str(self.folder / name).replace(INCOMPLETE, "")  # where it will be once the run is whole
        say(
            f"profile of steps {self.first} to {last}: {shown}.json.gz opens at https://ui.perfetto.dev or in "
            f"chrome://tracing; {name}.txt beside it lists what took longest"
        )

    def finish(self) -> None:
        """Training is over: write what was traced, or say that it was too short."""
        if self.trace is not None:
            self.write()
        elif self.submitted <= SKIPPED:
            warn(f"nothing was profiled: there were {self.submitted} steps, and tracing begins after {SKIPPED}")
