"""Alpa (Zheng et al. 2022): shardings inside of stages, stages over submeshes, and what of it the runtime can execute.

Layers of one kind share their solutions. For every shape of a submesh (data × model axis) each kind of layer is solved twice: freely,
and with weights divided as far as they can be; a stage takes the fastest of these, with or without recomputation, that fits into memory
beside the activations of the micro-batches that it keeps. Hidden states between layers have their rows over the data axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, inf

from luban.core.errors import ConfigError
from luban.core.opgraph import OpGraph
from luban.core.plan import ParallelPlan, even_runs
from luban.planner.cluster import Cluster
from luban.planner.memory import FP32
from luban.planner.search.estimate import Workload
from luban.planner.sharding.inter import Stages, best_stages, submeshes
from luban.planner.sharding.intra import Solution, problem_of, solve
from luban.planner.sharding.ir import Program, Spec, program_of
from luban.planner.sharding.mesh import Mesh
from luban.planner.sharding.passes import fuse

GROUPS = 24  # of layers that stages are made of, at most
GAP = 0.02  # between bounds on a stage's time that are tried
SLACK = 1.1  # of the least weights that a lean solution may hold


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A solution for one kind of layer on one shape of submesh."""

    data: int
    model: int
    seconds: float  # of a micro-batch
    weight_bytes: float  # of a device
    kept: float  # bytes of activations that a device keeps of a micro-batch
    solution: Solution
    recomputes: bool = False


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search found."""

    stages: Stages
    variants: tuple[tuple[int, int, bool], ...]  # of each stage: data, model axis, whether it recomputes
    groups: tuple[tuple[int, int], ...]  # layers of each group: first, past the last
    sizes: tuple[int, ...]  # devices of each kind of submesh
    micro_batches: int
    rows: int  # of a micro-batch, of all devices of a stage together
    solution: Solution  # of a layer of the first stage

    @property
    def seconds(self) -> float:
        """Of a step, without the update."""
        return self.stages.seconds

    def layers(self, stage: int) -> tuple[int, int]:
        """First layer of a stage, and past its last."""
        first, past, _ = self.stages.cuts[stage]
        return self.groups[first][0], self.groups[past - 1][1]


@dataclass
class Search:
    """Searches plans of a workload on a cluster.

    Args:
        micro_batches: B of a step.
    """

    workload: Workload
    cluster: Cluster
    micro_batches: int
    solved: dict[tuple[int, int, int], list[Variant]] = field(default_factory=dict)

    def run(self, gap: float = GAP) -> Found:
        """The best stages, shardings in them, and what they take.

        Raises:
            ConfigError: the batch can't be cut so. UnsupportedError: nothing fits into memory.
        """
        model, batch = self.workload.model, self.workload.batch
        if batch % self.micro_batches:
            raise ConfigError(f"a batch of {batch} rows can't be cut into {self.micro_batches} micro-batches")
        layers = len(model.kind_of)
        groups = list(even_runs(layers, min(layers, GROUPS)))
        sizes = [n for n in submeshes(self.cluster.nodes, self.cluster.gpus_per_node) if self._useful(n, len(groups))]
        known: dict[tuple[tuple[int, ...], int, int, int], float] = {}

        def time(first: int, past: int, number: int, later: int) -> float:
            counts = self._counts(groups[first][0], groups[past - 1][1])
            edges = (first == 0) + 2 * (past == len(groups))
            key = (counts, edges, number, later)
            if key not in known:
                known[key] = self._stage(counts, sizes[number], later, edges)[0]
            return known[key]

        stages = best_stages(len(groups), self.cluster.gpus, sizes, self.micro_batches, time, gap=gap)
        variants, number = [], len(stages.cuts)
        for at, (first, past, size) in enumerate(stages.cuts):
            counts = self._counts(groups[first][0], groups[past - 1][1])
            edges = (first == 0) + 2 * (past == len(groups))
            _, shape = self._stage(counts, sizes[size], number - at, edges)
            assert shape is not None
            variants.append((shape.data, shape.model, shape.recomputes))
        chosen = self._stage(self._counts(*groups[0]), sizes[stages.cuts[0][2]], number, 1)[1]
        assert chosen is not None
        return Found(
            stages=stages,
            variants=tuple(variants),
            groups=tuple(groups),
            sizes=tuple(sizes),
            micro_batches=self.micro_batches,
            rows=batch // self.micro_batches,
            solution=chosen.solution,
        )

    def _useful(self, size: int, groups: int) -> bool:
        """Submeshes so small that there are too few groups to fill the cluster with them are passed over, and counts of nodes
        that aren't a power of two beyond eight."""
        per_node = self.cluster.gpus_per_node
        if size < per_node:
            return self.cluster.gpus <= size * groups * 4
        nodes = size // per_node
        return nodes <= 8 or nodes & (nodes - 1) == 0 or self.cluster.nodes % nodes == 0

    def _counts(self, first: int, past: int) -> tuple[int, ...]:
        """Layers of each kind."""
        kinds = self.workload.model.kind_of[first:past]
        return tuple(kinds.count(kind) for kind in range(len(self.workload.model.layers)))

    def _stage(self, counts: tuple[int, ...], devices: int, later: int, edges: int) -> tuple[float, Variant | None]:
        """Seconds of a micro-batch in a stage, and how its layers run."""
        best: tuple[float, Variant | None] = (inf, None)
        for model in _powers(min(devices, self.cluster.gpus_per_node)):
            data, rest = divmod(devices, model)
            if rest or (self.workload.batch // self.micro_batches) % data:
                continue
            options = [self._variants(kind, data, model) if count else [] for kind, count in enumerate(counts)]
            for number in range(max(map(len, options))):
                picked = [each[min(number, len(each) - 1)] if each else None for each in options]
                for recomputes in (False, True):
                    seconds, memory = self._edges(edges, data, model)
                    for count, variant in zip(counts, picked, strict=True):
                        if variant is not None:
                            again = 4 / 3 if recomputes else 1.0
                            seconds += count * again * variant.seconds
                            memory += count * self._state(variant.weight_bytes)
                            kept = self.workload.model.hidden * self._rows / data if recomputes else variant.kept
                            memory += later * count * kept
                    if memory <= self.cluster.memory_bytes and seconds < best[0]:
                        first = next(variant for variant in picked if variant is not None)
                        best = (seconds, Variant(**{**vars(first), "recomputes": recomputes}))
        return best

    @property
    def _rows(self) -> int:
        return self.workload.batch // self.micro_batches

    def _state(self, weight_bytes: float) -> float:
        """Bytes of weights, gradients, masters and optimizer state."""
        parameters = weight_bytes / self.workload.weight_bytes
        each = self.workload.weight_bytes + self.workload.gradient_bytes + self.workload.optimizer_bytes
        masters = FP32 if self.workload.settings.master_weights and self.workload.weight_bytes < FP32 else 0
        return parameters * (each + masters)

    def _edges(self, edges: int, data: int, model: int) -> tuple[float, float]:
        """Seconds and bytes of embedding (1) and output layer (2)."""
        from luban.planner.search.layers import Slice

        seconds = memory = 0.0
        rows = max(self._rows // data, 1)
        for bit, kind, ops in ((1, -1, self.workload.model.before), (2, -2, self.workload.model.behind)):
            if edges & bit:
                costs = self.workload.model.costs(kind, Slice(rows, model))
                seconds += costs.forward + costs.backward
                memory += self._state(self.workload.weight_bytes * sum(op.parameters for op in ops) / model)
        return seconds, memory

    def _variants(self, kind: int, data: int, model: int) -> list[Variant]:
        """Solutions of a kind of layer on a data × model mesh, the fastest first."""
        key = (kind, data, model)
        if key not in self.solved:
            self.solved[key] = self._solve(kind, data, model)
        return self.solved[key]

    def _solve(self, kind: int, data: int, model: int) -> list[Variant]:
        layer = self.workload.model.layers[kind]
        program = fuse(program_of(layer, self._rows))
        mesh = Mesh(self.workload.model.messages, (data, model))
        problem = problem_of(
            program, mesh, self.workload.model.table, self.micro_batches, boundary=boundary(program, layer)
        )
        least = sum(min(strategy.weight_bytes for strategy in options) for options in problem.options)
        solutions = [solve(problem)]
        if solutions[0].weight_bytes > SLACK * least:
            solutions.append(solve(problem, SLACK * least))
        kept = self.workload.model.saved[kind] * self._rows / data / model
        return [
            Variant(
                data=data,
                model=model,
                seconds=solution.seconds,
                weight_bytes=solution.weight_bytes,
                kept=kept,
                solution=solution,
            )
            for solution in solutions
        ]


def boundary(program: Program, layer: OpGraph) -> dict[str, Spec]:
    """Specs of a layer's hidden states: rows over the data axis."""
    names = [value.name for value in layer.inputs if value.name in program.values]
    names.append(program.nodes[-1].output[0])
    specs = {name: ((0,), *((),) * (len(program.values[name].sizes) - 1)) for name in names}
    return {name: spec for name, spec in specs.items() if len(program.values[name].sizes) == 3}


def _powers(most: int) -> list[int]:
    found = [1]
    while found[-1] * 2 <= most:
        found.append(found[-1] * 2)
    return found


def cross_mesh(found: Found, stage: int) -> tuple[int, int, int]:
    """How hidden states go from a stage to the next: (pieces that the senders hold, pieces that the receivers need, messages of
    different content). Each receiver that needs what another of its model axis needs too gets its part and gathers the rest inside of
    its mesh (Alpa, section 6: local all-gather)."""
    (data, model, _), (next_data, next_model, _) = found.variants[stage], found.variants[stage + 1]
    return data * model, next_data * next_model, max(data, next_data) * max(model, next_model)


def as_plan(found: Found, layers: int) -> tuple[ParallelPlan | None, list[str]]:
    """The plan that the runtime executes, and what of the search's result it can't execute; None: nothing comes near."""
    reasons = []
    sizes = {found.sizes[number] for _, _, number in found.stages.cuts}
    shapes = {variant[:2] for variant in found.variants}
    if len(sizes) > 1:
        reasons.append(f"stages on submeshes of {' and '.join(map(str, sorted(sizes)))} devices: all need as many")
    if len(shapes) > 1:
        reasons.append("stages divided differently: all are divided alike")
    number = len(found.stages.cuts)
    runs = [found.layers(stage) for stage in range(number)]
    reasons += _unknown(found.solution)
    if len(sizes) > 1 or len(shapes) > 1:
        return None, reasons
    data, model, _ = found.variants[0]
    plan = ParallelPlan(
        replicate=data,
        tensor=model,
        pipeline=number,
        stage_layers=() if runs == list(even_runs(layers, number)) else tuple(past - first for first, past in runs),
        microbatches=found.micro_batches if number > 1 else 1,
        remat="full" if any(recomputes for _, _, recomputes in found.variants) else "none",
    )
    return plan, reasons


# what the runtime's tensor parallelism divides, by the role of the weight
EXECUTED: Mapping[str, str] = {"q": "o", "k": "o", "v": "o", "gate": "o", "up": "o", "o": "i", "down": "i"}


def _unknown(solution: Solution) -> list[str]:
    """Strategies that tensor parallelism doesn't have."""
    found = []
    for node, strategy in zip(solution.program.nodes, solution.chosen, strict=True):
        role = next((solution.program.values[n].role for n, _ in node.inputs if solution.program.values[n].weight), "")
        divided = next((label for label, dim in strategy.assignment.items() if 1 in dim), None)
        if role in EXECUTED and divided is not None and divided != EXECUTED[role]:
            found.append(
                f"{node.name.rsplit('.', 2)[-1]} with {divided} over the model axis: tensor divides {EXECUTED[role]}"
            )
    return found


def micro_batch_counts(batch: int, most: int = 64) -> list[int]:
    """Numbers of micro-batches that are tried: powers of two that divide the batch."""
    return [b for b in _powers(min(batch, most)) if batch % b == 0 and ceil(batch / b) >= 1]
