"""One training step under a parallel plan: computation, and the collectives that wait for it and that it waits for.

Ranks are placed as `ParallelPlan` places processes: tensor and context next to each other, then shards, replicas, pipeline stages.
Per micro-batch and layer: two tensor-parallel all-reduces forward and two backward; under ZeRO 3 its weights are gathered before
both passes, one layer ahead. Between stages: activations and gradients of their boundary. After a layer's last backward pass, while
earlier layers still compute: its gradients, summed over replicas, or scattered over shards and then summed over their copies; under
ZeRO 1 and 2 the updated weights are gathered behind them. All forward passes of a step come before its backward passes (GPipe; 1F1B
takes as long).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from luban.core.errors import ConfigError
from luban.core.plan import AXES, ParallelPlan
from luban.netsim.collectives.ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from luban.netsim.collectives.schedule import Schedule
from luban.netsim.flows import Flow, at_microseconds
from luban.netsim.topology.network import Network
from luban.netsim.workloads.base import Workload


@dataclass(frozen=True, kw_only=True)
class TrainingStep(Workload):
    """One step of a model of equal layers."""

    plan: ParallelPlan = field(default_factory=lambda: ParallelPlan(replicate=8))  # how it is spread
    layers: int = 8  # of the model; a multiple of the pipeline's stages
    layer_bytes: int = 50_000_000  # gradients of a layer, before tensor parallelism divides them
    weight_bytes: int = 25_000_000  # of a layer as shards gather it, before tensor parallelism divides it
    activation_bytes: int = 16_000_000  # of a micro-batch between two layers
    forward_us: float = 500.0  # of a layer and micro-batch on one device
    backward_us: float = 1000.0  # of a layer and micro-batch on one device
    bucket_layers: int = 1  # layers whose gradients are reduced together
    slow_rank: int = -1  # a rank that computes slower; -1: none
    slow_factor: float = 2.0  # how much slower it is

    def flows(self, network: Network, rng: np.random.Generator) -> list[Flow]:
        """The graph of the step."""
        plan, hosts = self.plan, len(network.hosts)
        if plan.processes > hosts:
            raise ConfigError(f"workload.plan needs {plan.processes} devices, and the cluster has {hosts}")
        if plan.stage_layers:
            raise ConfigError("workload.plan: stage_layers are not simulated; all stages have as many layers")
        if plan.expert > 1 or (plan.pipeline > 1 and plan.schedule not in ("gpipe", "1f1b")):
            what = "expert" if plan.expert > 1 else f"schedule {plan.schedule}"
            raise ConfigError(
                f"workload.plan: {what} is not simulated; layers are alike, and the schedule is gpipe or 1f1b"
            )
        if self.layers % plan.pipeline or self.layers < 1:
            raise ConfigError(
                f"workload.layers {self.layers} must be a multiple of the {plan.pipeline} pipeline stages"
            )
        schedule = Schedule(list(range(plan.processes)))
        return _Step(self, schedule).build()


class _Step:
    """The graph under construction: `last[rank]` is what a rank's next computation waits for."""

    def __init__(self, config: TrainingStep, schedule: Schedule):
        self.config, self.plan, self.schedule = config, config.plan, schedule
        self.last: list[list[int]] = [[] for _ in range(schedule.ranks)]
        self.before: list[list[int]] = [[] for _ in range(schedule.ranks)]  # what its last one waited for
        self.reducing: list[list[int]] = [[] for _ in range(schedule.ranks)]  # the last message about gradients
        self.gathering: list[list[int]] = [[] for _ in range(schedule.ranks)]  # the last gathered weights

    def build(self) -> list[Flow]:
        """GPipe's order: all forward passes, then all backward passes."""
        plan, layers = self.plan, self.config.layers // self.plan.pipeline
        for direction in ("forward", "backward"):
            stages = range(plan.pipeline) if direction == "forward" else range(plan.pipeline - 1, -1, -1)
            for micro in range(plan.microbatches):
                for stage in stages:
                    for layer in range(layers):
                        self._layer(stage, direction)
                        final = direction == "backward" and micro == plan.microbatches - 1
                        if final and ((layer + 1) % self.config.bucket_layers == 0 or layer == layers - 1):
                            self._reduce_gradients(stage, layer % self.config.bucket_layers + 1)
                    self._hand_on(stage, 1 if direction == "forward" else -1)
        return self.schedule.flows

    def _ranks(self, stage: int) -> list[int]:
        return [r for r in range(self.schedule.ranks) if self.plan.place(r)["pipeline"] == stage]

    def _groups(self, stage: int, *axes: str) -> list[list[int]]:
        """The ranks of a stage in groups that differ along the given axes only."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in self._ranks(stage):
            place = self.plan.place(rank)
            groups.setdefault(tuple(place[a] for a in AXES if a not in axes), []).append(rank)
        return list(groups.values())

    def _layer(self, stage: int, direction: str) -> None:
        config = self.config
        time = config.forward_us if direction == "forward" else config.backward_us
        divided = time / (self.plan.tensor * self.plan.context)
        if self.plan.shard > 1 and self.plan.zero == 3:
            self._gather_weights(stage)
        for rank in self._ranks(stage):
            self.before[rank] = self.last[rank]
        for _ in range(2):  # attention and feed-forward, each with an all-reduce over the tensor group after it
            for rank in self._ranks(stage):
                slow = config.slow_factor if rank == config.slow_rank else 1.0
                work = self.schedule.compute(
                    rank, at_microseconds(divided / 2 * slow), [*self.last[rank], *self.gathering[rank]]
                )
                self.last[rank] = [work]
            if self.plan.tensor > 1:
                for group in self._groups(stage, "tensor"):
                    size = config.activation_bytes // self.plan.context
                    self._collective(ring_all_reduce, group, size, self.last, self.last, "tensor")

    def _gather_weights(self, stage: int) -> None:
        """Of the next layer, while the one before it computes."""
        for group in self._groups(stage, "shard", "context"):
            size = self.config.weight_bytes // self.plan.tensor
            self._collective(ring_all_gather, group, size, self.before, self.gathering, "weights")

    def _reduce_gradients(self, stage: int, layers: int) -> None:
        plan, size = self.plan, layers * self.config.layer_bytes // self.plan.tensor
        if plan.shard == 1:
            for group in self._groups(stage, "replicate", "context"):
                self._collective(ring_all_reduce, group, size, self.last, self.reducing, "gradients")
            return
        for group in self._groups(stage, "shard", "context"):
            self._collective(ring_reduce_scatter, group, size, self.last, self.reducing, "gradients")
        for group in self._groups(stage, "replicate"):
            part = size // (plan.shard * plan.context)
            self._collective(ring_all_reduce, group, part, self.last, self.reducing, "gradients")
        if plan.zero < 3:
            weights = layers * self.config.weight_bytes // plan.tensor
            for group in self._groups(stage, "shard", "context"):
                self._collective(ring_all_gather, group, weights, self.last, self.reducing, "weights")

    def _collective(
        self,
        algorithm: Callable[[Schedule, int], None],
        group: list[int],
        size: int,
        after: list[list[int]],
        chain: list[list[int]],
        label: str,
    ) -> None:
        """A collective over a group, after each rank's computation `after` and its last message of the `chain`, whose last it
        then is."""
        if len(group) == 1:
            return
        inner = Schedule([self.schedule.hosts[r] for r in group], label=label)
        algorithm(inner, size)
        # One work of no time a rank joins what it has to wait for.
        before = [self.schedule.compute(r, 0, [*after[r], *chain[r]]) for r in group]
        for rank, touched in zip(group, self.schedule.extend(inner, before, inner.hosts), strict=True):
            chain[rank] = touched[-2:]  # what it sends and what it receives in the last step

    def _hand_on(self, stage: int, step: int) -> None:
        """Activations to the next stage, or gradients to the one before."""
        if not 0 <= stage + step < self.plan.pipeline:
            return
        size = self.config.activation_bytes // (self.plan.tensor * self.plan.context)
        for rank, other in zip(self._ranks(stage), self._ranks(stage + step), strict=True):
            sent = self.schedule.send(rank, other, size, self.last[rank])
            self.schedule.flows[sent].label = "pipeline"
            self.last[other] = [*self.last[other], sent]
