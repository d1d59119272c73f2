"""Seconds of a step and bytes of the fullest process under one plan.

A step of M micro-batches takes (M − 1) times the slowest stage, once through all stages, and what isn't hidden of the gradients'
sums and the update. With v groups of layers a process the way through all stages counts a v-th (Narayanan et al. 2021,
section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from luban.core.plan import SCHEDULES, ParallelPlan
from luban.kernels.limits import LOGIT_BYTES
from luban.planner.memory import FP32, StepSettings
from luban.planner.pipeline.stash import peak_stash
from luban.planner.remat.chain import Chain, Schedule
from luban.planner.remat.schedules import schedule_of
from luban.planner.search.layers import Costs, Model, Slice
from luban.planner.search.messages import Axis
from luban.planner.traffic import Spread


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan with the micro-batches of a step."""

    plan: ParallelPlan
    accumulate: int  # micro-batches; of a pipeline those that go through it in one step
    rows: int  # of a micro-batch, on one process


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a candidate takes."""

    candidate: Candidate
    seconds: float  # of a step
    memory: float  # bytes of the process that needs most
    bubble: float  # share of the step in which processes wait for each other's micro-batches
    messages: float  # share of the step in which processes only communicate
    computing: float  # seconds of a step in which the slowest stage computes
    model_flops: float  # of a step, without recomputation


def zero_bytes(
    parameters: float, processes: int, stage: int, *, weights: float = 2, gradients: float = 2, optimizer: float = 12
) -> float:
    """Bytes of a process's training state with ZeRO (Rajbhandari et al. 2020, section 5).

    Args:
        stage: 0: nothing is divided; 1: the optimizer's state; 2: gradients too; 3: weights too.
        weights, gradients, optimizer: bytes a parameter; the optimizer's with fp32 masters.
    """
    parts = [weights / (processes if stage == 3 else 1), gradients / (processes if stage >= 2 else 1)]
    return parameters * (sum(parts) + optimizer / (processes if stage >= 1 else 1))


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Args:
        batch: rows of a step.
        optimizer_bytes: of the optimizer's state, a parameter.
        weight_bytes: of weights as the matmuls read them; gradients are summed in `gradient_bytes`.
    """

    model: Model
    batch: int
    seq: int
    settings: StepSettings
    optimizer_bytes: float = 8.0
    weight_bytes: int = 2
    gradient_bytes: int = 4
    counted: dict[tuple[object, ...], list[tuple[int, int]]] = field(default_factory=dict)  # known parameters by plan

    def estimate(self, candidate: Candidate) -> Estimate:
        """Time and memory of a candidate."""
        plan, rows, number = candidate.plan, candidate.rows, candidate.accumulate
        cut = Slice(rows, plan.tensor, plan.context, plan.expert)
        stages = self._stages(plan, cut)
        slowest = max(stages, key=lambda costs: costs.forward + costs.backward)
        work = slowest.forward + slowest.backward
        once = sum(costs.forward + costs.backward for costs in stages)
        sends = self._sends(plan, cut) * (plan.stages // max(plan.pipeline, 1))
        fill = max(once / (plan.stages // plan.pipeline) - work, 0.0) if plan.pipeline > 1 else 0.0
        fill *= {"zero_bubble": 1 / 3}.get(plan.schedule, 1.0)
        per_process = work * (plan.stages // plan.pipeline)
        computing = number * per_process
        exposed = number * (sends + slowest.messages * (plan.stages // plan.pipeline))
        data, update = self._data(plan, number, computing), self._update(plan)
        seconds = computing + number * sends + fill + data + update
        return Estimate(
            candidate=candidate,
            seconds=seconds,
            memory=self.memory(candidate),
            bubble=fill / seconds,
            messages=(exposed + data) / seconds,
            computing=computing - number * slowest.messages * (plan.stages // plan.pipeline),
            model_flops=self.batch * self.model.row_flops,
        )

    def _stages(self, plan: ParallelPlan, cut: Slice) -> list[Costs]:
        """Each stage's costs of one micro-batch, recomputation included."""
        kinds, known, found = self.model.kind_of, {}, []
        each = [self._recomputed(plan, kind, cut) for kind in range(len(self.model.layers))]
        for stage, (begin, end) in enumerate(plan.stage_runs(len(kinds))):
            counts = tuple(kinds[begin:end].count(kind) for kind in range(len(each)))
            if counts not in known:
                total = Costs()
                for number, costs in zip(counts, each, strict=True):
                    total = total + costs.times(number)
                known[counts] = total
            total = known[counts]
            if stage == 0:
                total = total + self.model.costs(-1, cut)
            if stage == plan.stages - 1:
                total = total + self.model.costs(-2, cut)
            found.append(total)
        return found

    def _recomputed(self, plan: ParallelPlan, kind: int, cut: Slice) -> Costs:
        """A layer's costs with what is computed again."""
        costs = self.model.costs(kind, cut)
        if plan.remat == "selective":
            return replace(costs, backward=costs.backward + costs.elementwise)
        again = 1.0 if plan.remat == "full" else self._again(plan)
        return replace(
            costs, backward=costs.backward + again * costs.forward, messages=costs.messages * (1 + again / 2)
        )

    def _again(self, plan: ParallelPlan) -> float:
        """Forward passes of the layers beside the first under a schedule."""
        if plan.remat not in SCHEDULES:
            return 0.0
        chain, schedule = self._schedule(plan)
        return (schedule.makespan - sum(chain.forward) - sum(chain.backward)) / sum(chain.forward)

    def _schedule(self, plan: ParallelPlan) -> tuple[Chain, Schedule]:
        """Of the layers of a process, in bytes of one row."""
        layers = max(len(self.model.kind_of) // plan.pipeline, 1)
        kinds = self.model.kind_of[:layers]
        flops = [max(self.model.layers[kind].forward_flops, 1) for kind in kinds]
        chain = Chain(
            forward=flops,
            backward=[2 * f for f in flops],
            output_size=[self.model.hidden] * layers,
            saved_size=[max(self.model.saved[kind], self.model.hidden) for kind in kinds],
        )
        return chain, schedule_of(plan.remat, chain, plan.remat_budget)

    def _sends(self, plan: ParallelPlan, cut: Slice) -> float:
        """Seconds of the hidden states to the next stage and of their gradients, of one micro-batch; not hidden."""
        if plan.pipeline == 1:
            return 0.0
        axis = Axis(plan.pipeline, plan.processes // plan.pipeline)
        states = cut.rows * self.model.hidden / plan.context / plan.tensor
        return 2 * self.model.messages.seconds("send", states, axis)

    def _data(self, plan: ParallelPlan, number: int, computing: float) -> float:
        """Seconds of gradients' sums and gathered weights that aren't hidden behind computation."""
        copies, shards = plan.replicate, plan.shard * plan.context if plan.shard > 1 else 1
        if plan.shard == 1:
            copies *= plan.context
        count, experts = self._counts(plan)[0]
        gradient, seconds = (count - experts) * self.gradient_bytes, self.model.messages.seconds
        whole = seconds("all-reduce", gradient / shards, Axis(copies, plan.tensor * shards))
        whole += seconds(
            "all-reduce",
            experts * self.gradient_bytes,
            Axis(plan.processes // plan.pipeline // plan.expert, plan.expert),
        )
        if shards == 1:
            return whole
        axis = Axis(shards, plan.tensor)
        reductions = number if plan.zero_stage > 1 else 1
        gathers = 1 if plan.keeps_weights else number * (2 if plan.zero_stage == 3 else 1)
        if plan.keeps_weights and (plan.zero_stage == 2 or number == 1):
            gradient = (count - experts) * self.weight_bytes  # sent as they were computed
        moved = gathers * seconds("all-gather", (count - experts) * self.weight_bytes, axis)
        moved += reductions * seconds("reduce-scatter", gradient, axis)
        return whole + max(moved - self.model.table.overlap * computing, (1 - self.model.table.overlap) * moved)

    def _update(self, plan: ParallelPlan) -> float:
        """Seconds of the optimizer: state, weights and gradients read and written."""
        (count, experts), shards = self._counts(plan)[0], plan.shard * plan.context if plan.shard > 1 else 1
        each = 2 * self.optimizer_bytes + 2 * FP32 + self.weight_bytes + 2 * self.gradient_bytes
        return ((count - experts) / shards + experts) * each / self.model.table.copy_rate

    def _counts(self, plan: ParallelPlan) -> list[tuple[int, int]]:
        """(parameters, those of experts apart) of the first and of the last process of the pipeline."""
        known = self.counted
        key = (plan.tensor, plan.pipeline, plan.stages, plan.expert, plan.shard > 1)
        if key not in known:
            spread = Spread(self.model.graph, plan, 1, self.weight_bytes, self.gradient_bytes)
            places = dict.fromkeys((0, plan.pipeline - 1))
            known[key] = [(spread.parameters(p), sum(spread.apart(p))) for p in places]
        return known[key]

    def memory(self, candidate: Candidate) -> float:
        """Bytes of the process that needs most, at the larger of two moments as in `predict_memory`: the loss or the layer that is
        computed again, with all saved activations; the end of the backward pass, with all gradients."""
        plan, rows = candidate.plan, candidate.rows
        layers = max(len(self.model.kind_of) // plan.pipeline, 1)
        parts, found = plan.tensor * plan.context, []
        for process, (count, experts) in zip((0, plan.pipeline - 1), self._counts(plan), strict=False):
            state, sums, gradients = self._state(plan, candidate.accumulate, count - experts, experts, layers)
            stash = peak_stash(plan, candidate.accumulate)[process] / (plan.stages // plan.pipeline)
            kept = (rows * self._kept(plan, layers) + self._where_kept(self.model.joined, plan, layers)) / parts
            kept += rows * self._where_kept(self.model.gathered, plan, layers) * (1 / plan.context - 1 / parts)
            head = self._loss_bytes(rows, plan) if process == plan.pipeline - 1 else 0.0
            again = rows * max(self.model.saved, default=0) / parts if plan.remat == "full" else 0.0
            found.append(state + max(sums + stash * kept + max(head, again), gradients))
        return max(found)

    def _state(
        self, plan: ParallelPlan, accumulate: int, dense: float, experts: float, layers: int
    ) -> tuple[float, float, float]:
        """Bytes of a process's weights and optimizer state; of the sums of gradients that it has when a backward pass begins;
        of gradients when the last one ends."""
        shards = plan.shard * plan.context if plan.shard > 1 else 1
        stage = plan.zero_stage if shards > 1 else 0
        masters = FP32 if self.settings.master_weights and self.weight_bytes < FP32 else 0
        optimizer = self.optimizer_bytes + (masters if shards == 1 else FP32)
        # ZeRO 3 gathers the weights of two layers; its shards are the fp32 ones among the optimizer's
        weights = 0.0 if stage == 3 else self.weight_bytes
        state = zero_bytes(dense, shards, stage, weights=weights, gradients=0, optimizer=optimizer)
        state += self.weight_bytes * dense * min(2 / layers, 1.0) if stage == 3 else 0.0
        state += experts * (self.weight_bytes + optimizer)
        rows = dense / shards + experts  # parameters whose sums are this process's, once they have been exchanged
        if accumulate == 1:  # nothing is summed before; without shards gradients stay as they were computed
            return state, 0.0, self.weight_bytes * (dense + experts) if stage == 0 else self.gradient_bytes * rows
        summed = self.gradient_bytes * (rows if stage >= 2 else dense + experts)
        return state, summed, summed + (self.weight_bytes * (dense + experts) if stage == 0 else 0.0)

    def _loss_bytes(self, rows: int, plan: ParallelPlan) -> float:
        """Of a chunk of logits, its input's gradient and two buffers for the weight's gradient."""
        head, itemsize = next((op for op in self.model.behind if op.kind == "lm_head"), None), self.model.graph.itemsize
        if head is None:
            return 0.0
        logits = min(itemsize * rows * head.output.elements / plan.tensor / plan.context, LOGIT_BYTES)
        weights = head.in_features * head.out_features / plan.tensor
        inputs = head.output.elements / head.out_features * head.in_features
        return logits + 2 * FP32 * weights + itemsize * rows * inputs / plan.context

    def _kept(self, plan: ParallelPlan, layers: int) -> float:
        """Bytes that a process's layers keep of one row."""
        model = self.model
        if plan.remat == "full":
            return layers * model.hidden
        if plan.remat in SCHEDULES:
            return self._schedule(plan)[1].peak
        saved = model.saved_selectively if plan.remat == "selective" else model.saved
        return sum(saved[kind] for kind in model.kind_of) * layers / len(model.kind_of)

    def _where_kept(self, bytes_of: Sequence[int], plan: ParallelPlan, layers: int) -> float:
        """Bytes of a process's layers, by kind, where nothing is computed again; else 0."""
        if plan.remat != "none":
            return 0.0
        return sum(bytes_of[kind] for kind in self.model.kind_of) * layers / len(self.model.kind_of)
