"""What a plan makes of a prediction for one process: memory a rank, bytes a step, time that processes wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from luban.core.units import bytes_
from luban.planner.memory import FP32, MemoryPrediction, gathered_elements
from luban.planner.offload import LAYERS_HERE, HostMemory, host_memory
from luban.planner.pipeline.pipedream import staleness
from luban.planner.pipeline.stash import peak_stash
from luban.planner.pipeline.tables import table_of
from luban.planner.pipeline.timeline import Timeline, timeline
from luban.planner.step_time import StepTime
from luban.planner.traffic import Spread, Traffic

AXES_SHOWN = ("pipeline", "replicate", "shard", "context", "tensor")
WIDEST = 160  # characters of a schedule's picture
GATHERED = 2  # layers whose weights FSDP has gathered at once: one in use, the next on its way


@dataclass(frozen=True)
class Distribution:
    """A step's cost over the processes of a plan.

    Args:
        offloads: fp32 weights and optimizer state aren't on the device, and gradients leave it layer by layer.
    """

    spread: Spread
    offloads: bool = False

    @property
    def schedule(self) -> Timeline | None:
        """The pipeline's schedule in time; None without a pipeline."""
        plan = self.spread.plan
        return timeline(table_of(plan, self.spread.pieces), plan.stages) if plan.pipeline > 1 else None

    @property
    def bubble(self) -> float:
        """Time that processes wait for each other, as a share of the time that they work."""
        plan = self.spread.plan
        if plan.pipeline == 1 or plan.schedule == "pipedream":  # batches follow each other without a flush
            return 0.0
        assert self.schedule is not None
        return float(self.schedule.bubble())

    def memory(self, whole: MemoryPrediction) -> MemoryPrediction:
        """The memory of the process that needs most, from that of one which has the whole model and all tokens of its rows."""
        processes = range(self.spread.plan.pipeline)
        return max((self.process_memory(whole, process) for process in processes), key=lambda found: found.total)

    def process_memory(self, whole: MemoryPrediction, process: int) -> MemoryPrediction:
        """The memory of a process of the pipeline."""
        plan, graph = self.spread.plan, self.spread.graph
        count, whole_count = self.spread.parameters(process), max(graph.parameters, 1)
        apart, held = sum(self.spread.apart(process)) / whole_count, count / whole_count
        shards = plan.shard * plan.context if plan.shard > 1 else 1
        parameters, gradients = held * whole.parameters, held * whole.gradients
        if shards > 1:
            layers = max(len(graph.layers()) // plan.pipeline, 1)
            wide, alone = max(FP32, graph.itemsize), apart * whole_count
            inside = self.spread.in_layers(process) - alone
            gathered = count - alone - (inside if plan.zero_stage == 3 else 0)  # what lies in no layer stays so
            gathered += min(GATHERED / layers, 1.0) * inside if plan.zero_stage == 3 else 0
            mine = (
                0 if plan.keeps_weights and graph.itemsize == wide else (count - alone) / shards
            )  # else rows of the whole
            parameters = wide * (mine + alone) + graph.itemsize * gathered
            gradients = gradients if plan.zero_stage == 1 else ((held - apart) / shards + apart) * whole.gradients
            if self.offloads:
                # a layer's fp32 shard comes to the device to be gathered
                coming = 0 if plan.keeps_weights else min(GATHERED / layers, 1.0) * inside / shards
                parameters = wide * (coming + alone) + graph.itemsize * gathered
        if plan.offload_weights != "none":
            inside = self.spread.in_layers(process)
            layers = max(len(graph.layers()) // plan.pipeline, 1)
            parameters = graph.itemsize * (count - inside + min(LAYERS_HERE / layers, 1.0) * inside)
        if self.offloads:  # a layer's gradients are whole until they leave
            gradients = whole.gradients / plan.tensor
            if plan.shard > 1 and plan.zero_stage == 1 and self.spread.pieces > 1:  # until the last micro-batch all are
                gradients += max(FP32, graph.itemsize) * count * bool(whole.gradients)
        stash, stages = 1, 1.0
        if plan.pipeline > 1:  # every stash is of one of the process's stages
            stash, stages = peak_stash(plan, self.spread.pieces)[process], max(self._stage_shares(process))
            if (
                plan.schedule == "pipedream"
            ):  # and has the weights that its micro-batch met, of which one are the newest
                parameters += (stash - 1) * count * graph.itemsize
        parts = plan.tensor * plan.context
        activations = whole.activations / parts
        if plan.remat == "none" and whole.activations:
            activations += graph.itemsize * gathered_elements(graph) * (1 / plan.context - 1 / parts)
        return replace(
            whole,
            parameters=int(parameters),
            optimizer=int(
                ((held - apart) / shards + apart) * whole.optimizer if shards > 1 else held * whole.optimizer
            ),
            gradients=int(gradients),
            activations=int(activations * stash * stages),
            transient=int(whole.transient / parts),
        )

    def host(self, *, trained: float = 1.0, gpu: bool = True) -> HostMemory:
        """What offloading takes outside of the device, of the process that needs most.

        Args:
            trained: share of the parameters that are trained.
            gpu: as of `host_memory`.
        """
        plan, spread, found = self.spread.plan, self.spread, []
        shards = plan.shard * plan.context if plan.shard > 1 else 1
        layers = max(len(spread.graph.layers()) // plan.pipeline, 1)
        for process in range(plan.pipeline):
            count, alone = spread.parameters(process), sum(spread.apart(process))
            inside = spread.in_layers(process)
            host = host_memory(
                plan,
                int(trained * ((count - alone) / shards + alone)),
                inside=int(trained * inside),
                layer=int(trained * inside / layers),
                itemsize=spread.graph.itemsize,
                pieces=spread.pieces,
                gpu=gpu,
            )
            found.append(host)
        return max(found, key=lambda host: host.total + host.disk)

    def _stage_shares(self, process: int) -> list[float]:
        """The share of all layers that each stage of a process has."""
        plan, layers = self.spread.plan, len(self.spread.graph.layers())
        return [(end - begin) / layers for begin, end in plan.stage_runs(layers)[process :: plan.pipeline]]

    def step(self, whole: StepTime) -> StepTime:
        """The time of a step in which layers of a pipeline take equally long; messages aren't counted. The process with the most
        layers works all the time but for the bubble, in which a micro-batch passes through the others."""
        plan, factor = self.spread.plan, 1.0
        if plan.pipeline > 1:
            share = max(sum(self._stage_shares(process)) for process in range(plan.pipeline))
            factor = share + self.bubble * (1 - share) / (plan.pipeline - 1)
        factor /= plan.tensor * plan.context
        return replace(whole, **{name: factor * value for name, value in vars(whole).items()})

    def traffic(self) -> list[Traffic]:
        """What the process sends that sends most in a step."""
        every = [self.spread.traffic(process) for process in range(self.spread.plan.pipeline)]
        return max(every, key=lambda rows: sum(row.bytes for row in rows))

    def processes(self) -> str:
        """How many there are, and along which axes, in words."""
        plan = self.spread.plan
        sizes: Mapping[str, int] = {axis: getattr(plan, axis) for axis in AXES_SHOWN}
        axes = " × ".join(
            f"{axis} {size}{f' (ZeRO {plan.zero_stage})' * (axis == 'shard')}"
            for axis, size in sizes.items()
            if size > 1
        )
        return f"{plan.processes} processes: {axes}" + f", experts divided among {plan.expert}" * (plan.expert > 1)

    def lines(self, *, picture: bool = False) -> list[str]:
        """For `--dry-run`: processes, messages, bubble, and the schedule's picture."""
        plan, rows = self.spread.plan, [f"plan    {self.processes()}"]
        traffic = self.traffic()
        if traffic:
            rows.append(f"sends   {bytes_(sum(row.bytes for row in traffic))} a step by the process that sends most:")
            rows += [f"        {bytes_(row.bytes)} {row.axis} {row.collective} of {row.what}" for row in traffic]
        if self.schedule is not None:
            stash = ", ".join(map(str, self.schedule.peak_stash()))
            rows.append(
                f"bubble  {self.bubble:.1%} of the working time: {plan.schedule}, {self.spread.pieces} micro-batches in "
                f"{plan.stages} stages; micro-batches kept at once by each process: {stash}"
            )
            if plan.schedule == "pipedream":
                last = self.spread.pieces - 1
                stale = ", ".join(str(staleness(plan.pipeline, p, last)) for p in range(plan.pipeline))
                rows.append(
                    f"stale   updates that a micro-batch's weights are behind, at most, in each process: {stale}"
                )
        if picture:
            rows += self._picture()
        return rows

    def _picture(self) -> list[str]:
        if self.schedule is None:
            return ["picture plan.pipeline is 1: there is no schedule to draw"]
        lines = self.schedule.picture()
        cut = any(len(line) > WIDEST for line in lines)
        legend = "F forward, B backward (I of inputs, W of weights), with the micro-batch; small letters: later stages"
        return [line[:WIDEST] for line in lines] + [f"            {legend}{'; the rest is cut off' if cut else ''}"]
