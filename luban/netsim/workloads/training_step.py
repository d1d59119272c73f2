"""One training step under a parallel plan: computation, and the collectives that wait for it and that it waits for.

Ranks are placed as `ParallelPlan` places processes: tensor and context next to each other, then shards, replicas, pipeline stages.
Per micro-batch and layer: two tensor-parallel all-reduces forward and two backward; under ZeRO 3 its weights are gathered before
both passes, one layer ahead. Between stages: activations and gradients of their boundary. After a layer's last backward pass, while
earlier layers still compute: its gradients, summed over replicas, or scattered over shards and then summed over their copies; under
ZeRO 1 and 2 the updated weights are gathered behind them. A stage works in the order of the plan's schedule: GPipe's, all forward passes
first, or 1F1B's; either way a message between stages is on its way while its sender computes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import numpy as np

from luban.core.errors import ConfigError
from luban.core.pipeline_order import Action, one_forward_one_backward
from luban.core.plan import AXES, ParallelPlan
from luban.netsim.collectives.ring import ring_all_gather, ring_all_reduce, ring_reduce_scatter
from luban.netsim.collectives.schedule import Schedule
from luban.netsim.flows import Flow, at_microseconds
from luban.netsim.topology.network import Network
from luban.netsim.workloads.base import Workload

# fields of a plan that a step here depends on
SIMULATED = ("replicate", "shard", "zero", "tensor", "context", "pipeline", "microbatches", "schedule")


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
        if plan.schedule not in ("gpipe", "1f1b"):
            raise ConfigError(f"workload.plan.schedule {plan.schedule} is not simulated: use gpipe or 1f1b")
        for other in fields(plan):
            given = getattr(plan, other.name)
            if other.name not in SIMULATED and given != getattr(ParallelPlan(), other.name):
                raise ConfigError(
                    f"workload.plan.{other.name} {given} is not simulated, only {', '.join(SIMULATED)}: leave it out"
                )
        if not -1 <= self.slow_rank < plan.processes or self.slow_factor <= 0:
            raise ConfigError(
                f"workload.slow_rank {self.slow_rank} must be one of the plan's ranks, 0 to {plan.processes - 1}, or -1 for none, and "
                f"workload.slow_factor {self.slow_factor:g} above 0"
            )
        if self.bucket_layers < 1:
            raise ConfigError(f"workload.bucket_layers must be at least 1, {self.bucket_layers} given")
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
        self.handed: dict[Action, dict[int, int]] = {}  # the message that each rank needs for a pass over a stage

    def build(self) -> list[Flow]:
        """Each stage's passes in its order, as soon as what they need is on its way."""
        pipeline, micro = self.plan.pipeline, self.plan.microbatches
        warmups = [micro if self.plan.schedule == "gpipe" else pipeline - 1 - stage for stage in range(pipeline)]
        orders = [one_forward_one_backward(stage, micro, warmup)[::-1] for stage, warmup in enumerate(warmups)]
        while any(orders):
            for order in orders:
                while order and self._can_start(order[-1]):
                    self._pass(order.pop())
        return self.schedule.flows

    def _can_start(self, action: Action) -> bool:
        """Whether the message that a pass needs is among the flows; a stage's own passes are in order anyway."""
        first = 0 if action.kind == "F" else self.plan.pipeline - 1
        return action.stage == first or action in self.handed

    def _pass(self, action: Action) -> None:
        """A micro-batch forward or backward through the layers of a stage."""
        layers, final = self.config.layers // self.plan.pipeline, action.micro_batch == self.plan.microbatches - 1
        for rank, message in self.handed.get(action, {}).items():
            self.last[rank] = [*self.last[rank], message]
        for layer in range(layers):
            self._layer(action.stage, action.kind)
            bucket = layer % self.config.bucket_layers + 1
            if action.kind == "B" and final and (bucket == self.config.bucket_layers or layer == layers - 1):
                self._reduce_gradients(action.stage, bucket)
        self._hand_on(action)

    def _ranks(self, stage: int) -> list[int]:
        return [r for r in range(self.schedule.ranks) if self.plan.place(r)["pipeline"] == stage]

    def _groups(self, stage: int, *axes: str) -> list[list[int]]:
        """The ranks of a stage in groups that differ along the given axes only."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in self._ranks(stage):
            place = self.plan.place(rank)
            groups.setdefault(tuple(place[a] for a in AXES if a not in axes), []).append(rank)
        return list(groups.values())

    def _layer(self, stage: int, kind: str) -> None:
        config = self.config
        time = config.forward_us if kind == "F" else config.backward_us
        divided = time / (self.plan.tensor * self.plan.context)
        if self.plan.shard > 1 and self.plan.zero_stage == 3:
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
        if plan.zero_stage < 3:
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

    def _hand_on(self, action: Action) -> None:
        """Activations to the next stage, or gradients to the one before."""
        after = action._replace(stage=action.stage + (1 if action.kind == "F" else -1))
        if not 0 <= after.stage < self.plan.pipeline:
            return
        size = self.config.activation_bytes // (self.plan.tensor * self.plan.context)
        self.handed[after] = {}
        for rank, other in zip(self._ranks(action.stage), self._ranks(after.stage), strict=True):
            sent = self.schedule.send(rank, other, size, self.last[rank])
            self.schedule.flows[sent].label = "pipeline"
            self.handed[after][other] = sent
