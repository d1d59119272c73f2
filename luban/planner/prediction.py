"""What a run will need, for the person who starts it and for its manifest: memory, time, FLOPs, energy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from luban.core.units import bytes_, count, milliseconds, seconds
from luban.planner.accelerators import Machine
from luban.planner.memory import MemoryPrediction
from luban.planner.step_time import StepTime

COMPILER_BYTES = 250_000_000  # that torch.compile leaves in the process: 150 to 350 MB found (torch 2.13, one graph)
UNCOMPILED_OVERHEAD = 0.5  # main memory that kernels and the allocator hold, as a fraction of what a step allocates and
# frees (0.5 to 0.9 found)
FRAGMENTATION = 0.03  # fraction of a GPU's free memory that its allocator loses between blocks


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A run, predicted."""

    parameters: int  # of the model
    memory: MemoryPrediction  # at the peak of a step
    free: int  # bytes free on the device before the run
    resident: int  # bytes of main memory that this process held before
    machine: Machine
    on_cpu: bool  # whether the device is the CPU
    tokens_per_step: int
    steps: int  # of the whole run
    model_flops: float  # of one step, as utilisation counts them
    precision: str
    step: StepTime
    budget: float = 0.0  # seconds that the run is limited to (0: no limit)
    compiled: bool = False  # by torch.compile
    doubts: tuple[str, ...] = ()  # why figures may be off

    def spread(self, processes: int, shard: int) -> Prediction:
        """This prediction of one process's rows, for a run of `processes`, `shard` of which divide a copy of the model."""
        if processes == 1:
            return self
        memory = self.memory
        divided = {name: getattr(memory, name) // shard for name in ("parameters", "optimizer", "gradients")}
        doubt = "what processes send each other, and the weights that they gather, aren't counted"
        return replace(
            self,
            memory=replace(memory, **divided),
            tokens_per_step=self.tokens_per_step * processes,
            doubts=(*self.doubts, doubt),
        )

    @property
    def seconds(self) -> float:
        """Of the whole run, without compilation and validation."""
        return min(self.step.total * self.steps, self.budget or float("inf"))

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation (MFU); None where the accelerator isn't in the table."""
        peak = self.machine.peak_flops(self.precision)
        return None if peak is None else self.model_flops / self.step.total / peak

    @property
    def process(self) -> int:
        """Main memory that the process will hold at its peak when it trains on the CPU."""
        allocated = self.memory.activations + self.memory.transient
        return (
            self.resident
            + self.memory.total
            + (COMPILER_BYTES if self.compiled else int(UNCOMPILED_OVERHEAD * allocated))
        )

    @property
    def available(self) -> float:
        """Bytes of the free ones that a step can have."""
        if not self.on_cpu:
            return self.free * (1 - FRAGMENTATION)
        return max(self.free - COMPILER_BYTES, 0) if self.compiled else self.free / (1 + UNCOMPILED_OVERHEAD)

    def figures(self) -> dict[str, Any]:
        """For a run's manifest."""
        peak, row = self.machine.peak_flops(self.precision), self.machine.accelerator
        found: dict[str, Any] = {
            "predicted_memory_bytes": self.memory.total,
            "predicted_step_seconds": self.step.total,
            "model_flops_per_step": self.model_flops,
            "predicted_process_bytes": self.process,
        }
        if self.doubts:
            found["prediction_doubts"] = list(self.doubts)
        return found | ({"peak_flops": peak, "accelerator_watts": row.power} if peak and row else {})

    def summary(self) -> str:
        """One line, printed as training begins."""
        return (
            f"{count(self.parameters)} parameters on {self.machine.name} in {self.precision}; predicted: memory "
            f"{bytes_(self.memory.total)} of {bytes_(self.free)} free, a step in {milliseconds(self.step.total)}, "
            f"{count(self.tokens_per_step / self.step.total)} tokens/s" + "".join(f"; {doubt}" for doubt in self.doubts)
        )

    def lines(self) -> list[str]:
        """What --dry-run prints."""
        memory, row = self.memory, self.machine.accelerator
        steps = min(self.steps, int(self.seconds / self.step.total) + 1)
        share = "" if self.utilisation is None else f", {self.utilisation:.1%} of the accelerator's peak"
        rows = [
            f"model   {count(self.parameters)} parameters on {self.machine.name}, {self.precision}",
            f"memory  {bytes_(memory.total)} at the peak of a step; {bytes_(self.free)} are free",
            f"        parameters {bytes_(memory.parameters)}, optimizer {bytes_(memory.optimizer)}, gradients "
            f"{bytes_(memory.gradients)}, activations {bytes_(memory.activations)}, transient "
            f"{bytes_(memory.transient)}",
            f"step    {milliseconds(self.step.total)}: {self.step}",
            f"speed   {count(self.tokens_per_step / self.step.total)} tokens/s, "
            f"{self.model_flops / self.step.total / 1e12:.3g} TFLOP/s of the model{share}",
            f"run     {steps:,} steps, {count(float(steps * self.tokens_per_step))} tokens, "
            f"{steps * self.model_flops:.3g} FLOPs: about {seconds(self.seconds)}, without compilation and validation",
        ]
        if row is not None:
            rows.append(
                f"cost    {self.seconds / 3600:.3g} accelerator-hours, at most "
                f"{row.power * self.seconds / 3.6e6:.3g} kWh ({row.power:g} W)"
            )
        return rows + [f"doubt   {doubt}" for doubt in self.doubts]
