"""What a run has cost so far: seconds by kind, and the energy of its GPUs, earlier sessions included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from luban.core.gpu_energy import energy_counter
from luban.train.goodput import Goodput, added


class RunAccount:
    """Of one process of the run; the main process writes its figures to the manifest.

    Args:
        figures: of the run's manifest, which have those of sessions before a resume that ended properly.
        goodput: of this process.
        share: of the run's GPUs, whose energy is read. counter: of their joules; None: they have none.
    """

    def __init__(self, figures: Mapping[str, Any], goodput: Goodput, share: float, counter: Callable[[], float] | None):
        self.goodput, self.share, self.counter = goodput, share, counter
        self.earlier, self.earlier_joules = figures.get("goodput", {}), figures.get("energy_joules")
        self.began = 0.0 if counter is None else counter()
        # what an earlier session used and didn't read can't be added
        self.whole = self.earlier_joules is not None or not self.earlier

    @classmethod
    def of(cls, figures: Mapping[str, Any], goodput: Goodput, device: torch.device, processes: int) -> RunAccount:
        """Of a run of so many processes; of its GPUs those of this machine are read."""
        if device.type != "cuda":
            return cls(figures, goodput, 0.0, None)
        gpus = min(processes, torch.cuda.device_count())
        first = 0 if processes > 1 else device.index or 0
        uuids = [str(torch.cuda.get_device_properties(first + i).uuid) for i in range(gpus)]
        return cls(figures, goodput, gpus / processes, energy_counter(uuids))

    def figures(self) -> dict[str, Any]:
        """`goodput`, and where there is a counter `energy_joules` of a share `energy_share` of the run's GPUs, with what else ran on
        them meanwhile."""
        found: dict[str, Any] = {"goodput": added(self.earlier, self.goodput.seconds())}
        if self.counter is not None and self.whole:
            joules = (self.earlier_joules or 0.0) + self.counter() - self.began
            found |= {"energy_joules": joules, "energy_share": self.share}
        return found
