"""How a model is spread over devices and what it recomputes, as data. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from luban.core.errors import ConfigError
from luban.core.resuming import Numerical

Remat = Literal["none", "selective", "full"]
REMATS: tuple[str, ...] = get_args(Remat)  # from the most memory to the least


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How a run is spread over processes, one a device: replicate × shard of them. All read different rows of a batch."""

    replicate: Numerical[int] = 1  # copies of the model, whose gradients are summed
    shard: Numerical[int] = 1  # processes that divide one copy's training state among them
    zero: Numerical[Literal[1, 2, 3]] = 3  # what they divide: optimizer state; also gradients; also weights
    remat: Numerical[Remat] = (
        "none"  # recomputed in the backward pass: nothing, all but matmuls and attention, whole layers
    )

    def __post_init__(self):
        for axis in ("replicate", "shard"):
            if getattr(self, axis) < 1:
                raise ConfigError(f"plan.{axis} must be at least 1, {getattr(self, axis)} given")

    @property
    def processes(self) -> int:
        """How many processes it needs."""
        return self.replicate * self.shard

    def over(self, processes: int) -> ParallelPlan:
        """The plan for so many processes: as it is where it needs just those, replicated where it names no axis.

        Raises:
            ConfigError: it needs another number; the message names plans that would do.
        """
        if self.processes == processes:
            return self
        if self.processes == 1:
            return replace(self, replicate=processes)
        fits = [
            f"--plan.replicate {n} --plan.shard {processes // n}" for n in range(1, processes + 1) if processes % n == 0
        ]
        raise ConfigError(
            f"plan.replicate {self.replicate} × plan.shard {self.shard} needs {self.processes} processes, and there are "
            f"{processes}: start {self.processes} (--nproc {self.processes}), or give {' or '.join(fits)}"
        )

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """Raise ConfigError unless every micro-batch gives each process the same number of rows."""
        unit = accumulate * self.processes
        if batch_size % unit:
            near = max(round(batch_size / unit), 1) * unit
            raise ConfigError(
                f"train.batch_size {batch_size} can't be divided among {self.processes} processes"
                f"{f' in {accumulate} micro-batches' if accumulate > 1 else ''}: it must be a multiple of {unit}, such as {near}"
            )
