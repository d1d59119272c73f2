"""How a model is spread over devices and what it recomputes, as data. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import prod
from typing import Literal, get_args

from luban.core.errors import ConfigError
from luban.core.resuming import Numerical, Operational
from luban.core.units import share_or_size

Policy = Literal["none", "selective", "full"]  # of single layers
POLICIES: tuple[str, ...] = get_args(Policy)  # from the most memory to the least
Remat = Literal["none", "selective", "full", "sqrt", "rotor", "pofo"]
SCHEDULES = ("sqrt", "rotor", "pofo")  # of the layers of a stack together
BUDGETED = ("rotor", "pofo")  # those that are solved for a memory
Offload = Literal["none", "cpu", "disk"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "pipedream"]
# From the axis whose processes talk least to the one whose processes talk most, which lie side by side on one machine.
AXES = ("pipeline", "replicate", "shard", "context", "tensor")
NEAREST = 3  # plans that a refusal names, at most


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """How a run is spread over processes, one a device: the product of the axes is their number. Replicas and shards read
    different rows of a batch; the processes of the other axes work on the same rows."""

    replicate: Numerical[int] = 1  # copies of the model, whose gradients are summed
    shard: Numerical[int] = 1  # processes that divide one copy's training state among them
    # what they divide: optimizer state; also gradients; also weights (none: 3). Where it is given and neither replicas nor shards are,
    # shards take the processes that the other axes leave
    zero: Numerical[Literal[1, 2, 3] | None] = None
    tensor: Numerical[int] = 1  # processes that divide every matrix, and between layers the tokens of a row
    context: Numerical[int] = 1  # processes that divide the tokens of a row everywhere (ring attention)
    pipeline: Numerical[int] = 1  # processes that divide the layers
    expert: Numerical[int] = 1  # of shard · context · tensor processes, how many divide the experts of mixtures
    microbatches: Numerical[int] = 1  # pieces of a micro-batch that the pipeline works on at once
    schedule: Numerical[Schedule] = "1f1b"  # the order in which a stage of the pipeline works on them
    interleave: Numerical[int] = 2  # groups of layers that each process has under the schedule interleaved
    stage_layers: Numerical[
        tuple[int, ...]
    ] = ()  # numbers of layers of the pipeline's stages, such as 1,4 (none: as equal as can be)
    # recomputed in the backward pass: nothing; all but matmuls and attention; whole layers; as a schedule of all layers says:
    # √n segments, or the fastest schedule within remat_budget; pofo also sends tensors to the host and back
    remat: Numerical[Remat] = "none"
    # of rotor and pofo: memory for the activations of one micro-batch in the layers, a size such as 2GB or a share of what saving all
    # of them takes
    remat_budget: Numerical[str] = "50%"
    # what a layer keeps where a schedule keeps it: everything, or matmuls and attention alone (compiled layers)
    remat_layer: Numerical[Literal["none", "selective"]] = "none"
    # where fp32 weights and Adam's moments live and are updated: on the device, in host memory, in a file of offload_folder
    offload: Numerical[Offload] = "none"
    # where sums of gradients are, with offload: in host memory, or beside the state on the disk
    offload_gradients: Numerical[Literal["cpu", "disk"]] = "cpu"
    # where the layers' weights in the dtype of the matmuls are while others compute, with offload: on the device, in host memory, in
    # the file of offload_folder
    offload_weights: Numerical[Offload] = "none"
    offload_folder: Operational[str] = ""  # of a fast disk; for what is offloaded to disk
    offload_delay: bool = False  # the host updates while the next step computes with weights of the step before
    # pieces in which the matrices inside of layers are read from the host, where they stay, and multiplied (0: they are on the device)
    offload_tiles: Numerical[int] = 0

    def __post_init__(self):
        for axis in (*AXES, "microbatches", "interleave"):
            if getattr(self, axis) < 1:
                raise ConfigError(f"plan.{axis} must be at least 1, {getattr(self, axis)} given")
        if self.stage_layers and (len(self.stage_layers) != self.stages or min(self.stage_layers) < 1):
            raise ConfigError(
                f"plan.stage_layers {','.join(map(str, self.stage_layers))} must name at least one layer for each of the "
                f"{self.stages} stages of the pipeline"
            )
        share_or_size("plan.remat_budget", self.remat_budget)
        self._check_offload()
        if self.remat_layer != "none" and self.remat not in SCHEDULES:
            raise ConfigError(
                f"plan.remat_layer {self.remat_layer} is for layers that a schedule keeps, and plan.remat is {self.remat}: "
                f"use --plan.remat rotor, or --plan.remat {self.remat_layer} alone"
            )
        if self.remat == "pofo" and self.pipeline > 1:
            raise ConfigError("plan.remat pofo does not go with plan.pipeline: use --plan.remat rotor")
        if self.pipeline == 1 and self.microbatches > 1:
            raise ConfigError(
                f"plan.microbatches {self.microbatches} are pieces for a pipeline, and plan.pipeline is 1: "
                f"use --train.accumulate {self.microbatches}"
            )
        if self.expert < 1 or (self.expert_processes % self.expert and not self.shards_what_is_left):
            sizes = [n for n in range(1, self.expert_processes + 1) if self.expert_processes % n == 0]
            near = min(sizes, key=lambda n: abs(n - self.expert))
            wider = f" or --plan.shard {self.expert}" * (self.expert_processes == 1 < self.expert)
            raise ConfigError(
                f"plan.expert {self.expert} must divide plan.shard · plan.context · plan.tensor, which is "
                f"{self.expert_processes}: use --plan.expert {near}{wider}"
            )

    def _check_offload(self) -> None:
        if self.offload_gradients == "disk" and self.offload != "disk":
            raise ConfigError(
                f"plan.offload_gradients disk keeps them beside training state on the disk, and plan.offload is {self.offload}: use "
                "--plan.offload disk"
            )
        if self.offload_weights != "none" and self.offload == "none":
            raise ConfigError(
                f"plan.offload_weights {self.offload_weights} is for fp32 weights outside of the device: use --plan.offload cpu"
            )
        self._check_layer_weights()
        if self.uses_disk and not self.offload_folder:
            raise ConfigError("plan.offload disk needs a folder of a fast disk: --plan.offload_folder /nvme/luban")
        if self.offload_delay and self.offload == "none":
            raise ConfigError("plan.offload_delay delays updates on the host: use --plan.offload cpu")
        if self.offload_tiles < 0:
            raise ConfigError(f"plan.offload_tiles is a number from 0, {self.offload_tiles} given")
        if self.offload_tiles and self.offload == "none":
            raise ConfigError("plan.offload_tiles reads matrices from the host: use --plan.offload cpu")
        if self.offload != "none" and self.processes > 1:
            self._check_offload_processes()

    def _check_layer_weights(self) -> None:
        """Raise ConfigError for what doesn't go with weights that come to the device with their layer."""
        if self.offload_weights == "none":
            return
        what = f"plan.offload_weights {self.offload_weights}"
        if self.remat in SCHEDULES:
            raise ConfigError(
                f"{what} does not go with plan.remat {self.remat}, which runs layers out of order: use --plan.remat full"
            )
        if self.offload_tiles:
            raise ConfigError(
                f"{what} does not go with plan.offload_tiles, whose matrices stay on the host: leave one out"
            )
        if self.shard > 1:
            raise ConfigError(
                f"{what} does not go with plan.shard: use --plan.zero 3 without plan.offload_weights, which keeps shards of all weights "
                "in host memory and gathers them layer by layer"
            )

    def _check_offload_processes(self) -> None:
        """Raise ConfigError for what doesn't go with offloading in several processes."""
        what = f"plan.offload {self.offload}"
        if self.shard == 1 and self.replicate * self.context > 1 and not self.shards_what_is_left:
            axis = "replicate" if self.replicate > 1 else "context"
            raise ConfigError(
                f"{what} does not go with plan.{axis} alone, of which every process would keep all of the training state on the host: "
                f"use --plan.shard 2 --plan.{axis} {max(getattr(self, axis) // 2, 1)}, or another number of shards"
            )
        if self.pipeline > 1 and self.schedule in ("zero_bubble", "pipedream"):
            raise ConfigError(
                f"{what} does not go with plan.schedule {self.schedule}, whose gradients don't leave one by one: use --plan.schedule "
                "1f1b or interleaved"
            )
        if self.offload_tiles:
            raise ConfigError(
                f"plan.offload_tiles goes with one process, and this plan has {self.processes}: leave it out, or use --plan.shard with "
                "--plan.zero 3, which gathers one layer at a time"
            )
        if not self.shards_by_layer:
            return
        other = "--plan.zero 2" if self.pipeline == 1 else "--plan.zero 2 without plan.pipeline"
        for field, wrong in (("offload disk", self.offload == "disk"), ("offload_delay", self.offload_delay)):
            if wrong:
                raise ConfigError(
                    f"plan.{field} does not go with weights that are gathered layer by layer from fp32 shards in host memory "
                    f"(plan.zero 3, or shards of pipelines): use {other}"
                )

    @property
    def uses_disk(self) -> bool:
        """Whether anything is offloaded to a disk."""
        return "disk" in (self.offload, self.offload_gradients, self.offload_weights)

    @property
    def zero_stage(self) -> Literal[1, 2, 3]:
        """What the processes of the axis shard divide."""
        return self.zero or 3

    @property
    def shards_what_is_left(self) -> bool:
        """Whether shards take the processes that other axes leave, which `over` knows."""
        return self.zero is not None and self.readers == 1

    @property
    def expert_processes(self) -> int:
        """The processes of one copy and stage, among which experts can be divided."""
        return self.shard * self.context * self.tensor

    @property
    def processes(self) -> int:
        """How many processes it needs."""
        return prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Processes along each of the AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def readers(self) -> int:
        """How many different parts a batch's rows are divided into."""
        return self.replicate * self.shard

    @property
    def parts(self) -> int:
        """Among how many processes the work on one row is divided."""
        return self.tensor * self.context * self.pipeline

    @property
    def stages(self) -> int:
        """Consecutive groups of layers that the pipeline passes through."""
        return self.pipeline * (self.interleave if self.schedule == "interleaved" else 1)

    def stage_runs(self, layers: int) -> list[tuple[int, int]]:
        """(first, past the last) of the layers of each stage. Raises ConfigError if `stage_layers` has another sum."""
        if not self.stage_layers:
            return list(even_runs(layers, self.stages))
        if sum(self.stage_layers) != layers:
            raise ConfigError(
                f"plan.stage_layers {','.join(map(str, self.stage_layers))} is {sum(self.stage_layers)} layers in all, and the "
                f"model has {layers}"
            )
        ends = list(accumulate(self.stage_layers))
        return list(zip([0, *ends[:-1]], ends, strict=True))

    @property
    def keeps_weights(self) -> bool:
        """Whether the axis shard divides the optimizer's state and gradients, and weights stay whole from step to step."""
        return self.shard > 1 and self.zero_stage < 3 and self.pipeline == 1

    @property
    def shards_by_layer(self) -> bool:
        """Whether weights lie in fp32 shards of layers (FSDP), which are gathered where they are used."""
        return self.shard > 1 and not self.keeps_weights

    @property
    def layer_policy(self) -> Remat:
        """What each layer computes again by itself."""
        return self.remat_layer if self.remat in SCHEDULES else self.remat

    @property
    def recomputes(self) -> bool:
        """Whether whole layers run again in the backward pass: under a schedule those that it doesn't keep, at most once each
        with √n segments."""
        return self.remat in ("full", *SCHEDULES)

    def place(self, rank: int) -> dict[str, int]:
        """The index of a process along each axis."""
        found = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return found

    def over(self, processes: int) -> ParallelPlan:
        """The plan for so many processes: as it is where it needs just those; where it names neither replicas nor shards,
        replicated as often as fits, or sharded where it names `zero`.

        Raises:
            ConfigError: it needs another number; the message names plans that would do.
        """
        if self.processes == processes:
            return self
        if self.readers == 1 and processes % self.processes == 0:
            axis = "shard" if self.shards_what_is_left else "replicate"
            return replace(self, **{axis: processes // self.processes})
        given = " × ".join(f"plan.{axis} {getattr(self, axis)}" for axis in reversed(AXES) if getattr(self, axis) > 1)
        fits = " or ".join(self._options(processes))
        raise ConfigError(
            f"{given or 'the plan'} needs {self.processes} processes, and there are {processes}: "
            f"start {self.processes} (--nproc {self.processes}), or give {fits}"
        )

    def _options(self, processes: int) -> list[str]:
        """The nearest plans over so many processes, along the axes that this one names."""
        named = [axis for axis in AXES if getattr(self, axis) > 1] or ["replicate"]
        if self.readers > 1:
            named = sorted({*named, "replicate", "shard"}, key=AXES.index)
        sizes = [n for n in range(1, processes + 1) if processes % n == 0]
        found = [whole for whole in product(sizes, repeat=len(named)) if prod(whole) == processes]
        found.sort(key=lambda whole: sum(abs(n - getattr(self, axis)) for n, axis in zip(whole, named, strict=True)))
        return [
            " ".join(f"--plan.{axis} {n}" for n, axis in zip(whole, named, strict=True)) for whole in found[:NEAREST]
        ]

    def check_used(self, processes: int = 1) -> None:
        """Raise ConfigError for a field that would change nothing in a run of so many processes, since it goes with a value that
        another field hasn't."""
        if self.shards_what_is_left and processes <= self.processes:
            more = 2 * self.processes
            raise ConfigError(
                f"plan.zero {self.zero} says what plan.shard divides among processes, and none is left for it of "
                f"{self.processes} in all: start {more} (--nproc {more}), or leave plan.zero out"
            )
        if self.zero and self.replicate > 1 == self.shard:
            raise ConfigError(
                f"plan.zero {self.zero} says what the processes of plan.shard divide, and plan.shard is 1: use "
                f"--plan.shard N --plan.zero {self.zero}, or leave plan.zero out"
            )
        if self.pipeline == 1 and (self.schedule != "1f1b" or self.stage_layers):
            what = f"schedule {self.schedule}" if self.schedule != "1f1b" else "stage_layers"
            raise ConfigError(
                f"plan.{what} is for pipelines, and plan.pipeline is 1: use --plan.pipeline, or leave it out"
            )
        if self.schedule != "interleaved" and self.interleave != ParallelPlan.interleave:
            raise ConfigError(
                f"plan.interleave {self.interleave} is for another schedule than {self.schedule}: use --plan.pipeline N "
                "--plan.schedule interleaved, or leave it out"
            )
        if self.remat not in BUDGETED and self.remat_budget != ParallelPlan.remat_budget:
            raise ConfigError(
                f"plan.remat_budget {self.remat_budget} is for {' and '.join(BUDGETED)}, and plan.remat is {self.remat}: use "
                f"--plan.remat {BUDGETED[0]}, or leave plan.remat_budget out"
            )
        if self.offload_folder and not self.uses_disk:
            raise ConfigError(
                f"plan.offload_folder {self.offload_folder} is for training state on a disk, and plan.offload is {self.offload}: "
                "use --plan.offload disk, or leave plan.offload_folder out"
            )

    def check_batch(self, batch_size: int, accumulate: int) -> None:
        """Raise ConfigError unless every micro-batch gives each process the same number of rows."""
        pieces = accumulate * self.microbatches
        unit = pieces * self.readers
        if batch_size % unit:
            near = max(round(batch_size / unit), 1) * unit
            among = [f"divided among {self.readers} processes"] if self.readers > 1 else []
            among += [f"cut into {pieces} micro-batches"] if pieces > 1 else []
            raise ConfigError(
                f"train.batch_size {batch_size} can't be {' and '.join(among)}: it must be a multiple of {unit}, such as {near}"
            )
        if self.pipeline > 1 and self.schedule == "interleaved" and pieces % self.pipeline:
            near = -(-pieces // self.pipeline) * self.pipeline
            raise ConfigError(
                f"the interleaved schedule works on {self.pipeline} micro-batches at a time, and there are {pieces}: "
                f"use --plan.microbatches {near // accumulate or near}, or --plan.schedule 1f1b"
            )

    def check_tokens(self, seq_len: int) -> None:
        """Raise ConfigError unless the tokens of a row can be divided in two pieces a process of the axis context."""
        unit = 2 * self.context
        if self.context > 1 and seq_len % unit:
            near = max(round(seq_len / unit), 1) * unit
            raise ConfigError(
                f"plan.context {self.context} divides rows into {unit} pieces, and train.seq_len is {seq_len}: "
                f"use a multiple of {unit}, such as --train.seq_len {near}"
            )


def even_runs(total: int, parts: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of consecutive runs of so many things, as equal as can be, the longer ones first."""
    size, longer = divmod(total, parts)
    begin = 0
    for part in range(parts):
        end = begin + size + (part < longer)
        yield begin, end
        begin = end
