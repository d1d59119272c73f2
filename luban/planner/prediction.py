"""Predicted memory, time, FLOPs and energy of a run, for the command line and the run's manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from luban.core.units import bytes_, count, milliseconds, seconds
from luban.planner.accelerators import Machine
from luban.planner.distribution import Distribution
from luban.planner.memory import MemoryPrediction
from luban.planner.offload import HostMemory
from luban.planner.step_time import StepTime

# memory torch.compile leaves allocated; measured 150–350 MB (torch 2.13, one graph)
COMPILER_BYTES = 250_000_000
# kernel and allocator overhead as a fraction of a step's allocations; measured 0.5–0.9
UNCOMPILED_OVERHEAD = 0.5
FRAGMENTATION = 0.03  # fraction of a GPU's free memory lost to fragmentation of the caching allocator


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted cost of a run."""

    parameters: int  # number of the model's parameters
    active_parameters: int  # that a token uses: all, or of mixtures of experts the chosen ones
    memory: MemoryPrediction  # at the peak of a step
    free_bytes: int  # free memory of the device before the run
    resident_bytes: int  # resident memory of this process before the run
    machine: Machine
    on_cpu: bool  # the device is the CPU
    tokens_per_step: int
    steps: int  # of the whole run
    model_flops: float  # of one step (MFU numerator)
    precision: str
    step: StepTime
    budget: float = 0.0  # time limit of the run in seconds (0: none)
    compiled: bool = False  # by torch.compile
    caveats: tuple[str, ...] = ()  # why the predictions may be wrong
    distribution: Distribution | None = None  # over several processes; None: one
    trained: int | None = None  # parameters of adapters and modules trained with them; None: all are trained
    host: HostMemory | None = None  # of offloaded training state; None: there is none

    def over(self, distribution: Distribution) -> Prediction:
        """This prediction for the processes of a plan, from that of one process with the whole model and the rows of one
        reader."""
        plan = distribution.spread.plan
        if plan.processes == 1:
            return self
        return replace(
            self,
            memory=distribution.memory(self.memory),
            step=distribution.step(self.step),
            tokens_per_step=self.tokens_per_step * plan.readers,
            model_flops=self.model_flops * plan.readers,
            distribution=distribution,
            caveats=(*self.caveats, "the time of messages between processes isn't counted"),
        )

    def offloaded(self, host: HostMemory) -> Prediction:
        """This prediction with what offloading takes outside of the device; on a CPU that is the same memory."""
        return replace(self, host=host, memory=self.memory.beside(host) if self.on_cpu else self.memory)

    @property
    def seconds(self) -> float:
        """Seconds of the whole run, without compilation and validation."""
        return min(self.step.total * self.steps, self.budget or float("inf"))

    @property
    def processes(self) -> int:
        """How many processes the run has, one an accelerator."""
        return 1 if self.distribution is None else self.distribution.spread.plan.processes

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation (MFU); None if the accelerator isn't in accelerators.toml."""
        peak = self.machine.peak_flops(self.precision)
        return None if peak is None else self.model_flops / self.processes / self.step.total / peak

    @property
    def process_bytes(self) -> int:
        """Peak resident memory of the process when it trains on the CPU."""
        allocated = self.memory.activations + self.memory.transient
        return (
            self.resident_bytes
            + self.memory.total
            + (COMPILER_BYTES if self.compiled else int(UNCOMPILED_OVERHEAD * allocated))
        )

    @property
    def available_bytes(self) -> float:
        """Bytes a step may use."""
        if not self.on_cpu:
            return self.free_bytes * (1 - FRAGMENTATION)
        if self.compiled:
            return max(self.free_bytes - COMPILER_BYTES, 0)
        return self.free_bytes / (1 + UNCOMPILED_OVERHEAD)

    def figures(self) -> dict[str, Any]:
        """The predictions that a run's manifest records."""
        peak, row = self.machine.peak_flops(self.precision), self.machine.accelerator
        found: dict[str, Any] = {
            "predicted_memory_bytes": self.memory.total,
            "predicted_step_seconds": self.step.total,
            "model_flops_per_step": self.model_flops,
            "predicted_process_bytes": self.process_bytes,
        }
        if self.distribution is not None:
            found["predicted_messages"] = [asdict(row) for row in self.distribution.traffic()]
        if self.host is not None:
            found |= {"predicted_host_bytes": self.host.total, "predicted_disk_bytes": self.host.disk}
        if self.caveats:
            found["prediction_caveats"] = list(self.caveats)
        if peak and row:  # of all accelerators together
            found |= {"peak_flops": self.processes * peak, "accelerator_watts": self.processes * row.power}
        return found

    def summary(self) -> str:
        """One line, printed as training begins."""
        spread = "" if self.distribution is None else f", {self.distribution.processes()}"
        return (
            f"{count(self.parameters)} parameters{self._trained()} on {self.machine.name} in {self.precision}{spread}; predicted: "
            f"memory {bytes_(self.memory.total)} of {bytes_(self.free_bytes)} free, a step in {milliseconds(self.step.total)}, "
            f"{count(self.tokens_per_step / self.step.total)} tokens/s"
            + "".join(f"; {caveat}" for caveat in self.caveats)
        )

    def _active(self) -> str:
        return "" if self.active_parameters == self.parameters else f" ({count(self.active_parameters)} a token)"

    def _trained(self) -> str:
        return "" if self.trained is None else f", {count(self.trained)} trained,"

    def lines(self, *, picture: bool = False) -> list[str]:
        """The lines that --dry-run prints; with the `picture` of a pipeline's schedule."""
        memory, row = self.memory, self.machine.accelerator
        steps = min(self.steps, int(self.seconds / self.step.total) + 1)
        mfu = "" if self.utilisation is None else f", MFU {self.utilisation:.1%}"
        rows = [
            f"model   {count(self.parameters)} parameters{self._active()}{self._trained()} on {self.machine.name}, {self.precision}",
            f"memory  {bytes_(memory.total)} at the peak of a step; {bytes_(self.free_bytes)} are free",
            f"        parameters {bytes_(memory.parameters)}, optimizer {bytes_(memory.optimizer)}, gradients "
            f"{bytes_(memory.gradients)}, activations {bytes_(memory.activations)}, transient "
            f"{bytes_(memory.transient)}",
            *([] if self.host is None else [f"host    {self.host}"]),
            f"step    {milliseconds(self.step.total)}: {self.step}",
            f"speed   {count(self.tokens_per_step / self.step.total)} tokens/s, "
            f"{self.model_flops / self.step.total / 1e12:.3g} model TFLOP/s{mfu}",
            f"run     {steps:,} steps, {count(float(steps * self.tokens_per_step))} tokens, "
            f"{steps * self.model_flops:.3g} FLOPs: about {seconds(self.seconds)}, without compilation and validation",
        ]
        if row is not None:
            rows.append(
                f"cost    {self.processes * self.seconds / 3600:.3g} accelerator-hours, at most "
                f"{self.processes * row.power * self.seconds / 3.6e6:.3g} kWh ({row.power:g} W{' each' * (self.processes > 1)})"
            )
        if self.distribution is not None:
            rows += self.distribution.lines(picture=picture)
        elif picture:
            rows.append("picture plan.pipeline is 1: there is no schedule to draw")
        return rows + [f"caveat  {caveat}" for caveat in self.caveats]
