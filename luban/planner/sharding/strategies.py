"""Every way in which a node can run on a mesh, with what it costs (Zheng et al. 2022, Alpa, section 4).

A strategy gives each axis of the mesh to one label, or to none. Seconds are those of one micro-batch forward and backward: computation,
the sums of partial results, and, divided by the micro-batches of a step, the sum of the weights' gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from luban.planner.machine import MachineTable
from luban.planner.sharding.ir import Dim, Node, Program, Spec, spec_of
from luban.planner.sharding.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A way in which a node runs."""

    assignment: Mapping[str, Dim]  # label → axes
    inputs: tuple[Spec, ...]
    output: Spec
    scattered: int | None = None  # axis over which partial sums are reduce-scattered instead of all-reduced
    compute: float  # seconds
    messages: float  # seconds inside of the node
    weight_bytes: float  # of a device

    @property
    def seconds(self) -> float:
        """Computation and messages, which don't overlap."""
        return self.compute + self.messages

    def __str__(self) -> str:
        parts = [f"{label}:{'·'.join(f'mesh{a}' for a in dim)}" for label, dim in self.assignment.items() if dim]
        parts += [f"sums scattered over mesh{self.scattered}"] * (self.scattered is not None)
        return ", ".join(parts) or "whole on every device"


def strategies(
    program: Program,
    node: Node,
    mesh: Mesh,
    table: MachineTable,
    micro_batches: int,
    outer: tuple[str, ...] | None = None,
) -> list[Strategy]:
    """All of a node; of those that read and return the same specs only the fastest.

    Args:
        outer: labels that axis 0 may divide; None: any.
    """
    best: dict[tuple[object, ...], Strategy] = {}
    free = [label for label in node.labels if label not in node.fixed]
    first_free = [label for label in free if outer is None or label in outer]
    for first, second in product((*first_free, None), (*free, None)):
        if (first is not None and mesh.sizes[0] == 1) or (second is not None and mesh.sizes[1] == 1):
            continue
        assignment: dict[str, Dim] = {}
        for axis, label in ((0, first), (1, second)):
            if label is not None:
                assignment[label] = (*assignment.get(label, ()), axis)
        if not all(_divides(program, node, label, dim, mesh) for label, dim in assignment.items()):
            continue
        for strategy in _variants(program, node, assignment, mesh, table, micro_batches):
            key = (strategy.inputs, strategy.output)
            if key not in best or strategy.seconds < best[key].seconds:
                best[key] = strategy
    return list(best.values())


def _divides(program: Program, node: Node, label: str, dim: Dim, mesh: Mesh) -> bool:
    pieces = 1
    for axis in dim:
        pieces *= mesh.sizes[axis]
    return node.units.get(label, program.size(node, label)) % pieces == 0


def _variants(
    program: Program,
    node: Node,
    assignment: Mapping[str, Dim],
    mesh: Mesh,
    table: MachineTable,
    micro_batches: int,
) -> list[Strategy]:
    """A strategy, and where it leaves partial sums those that scatter them over rows or tokens."""
    inputs = tuple(spec_of(labels, assignment) for _, labels in node.inputs)
    output = spec_of(node.output[1], assignment)
    weights = [
        program.values[name].bytes / mesh.parts(spec)
        for (name, _), spec in zip(node.inputs, inputs, strict=True)
        if program.values[name].weight
    ]
    gradients = sum(
        _gradient_sums(program, name, spec, assignment, labels, mesh)
        for (name, labels), spec in zip(node.inputs, inputs, strict=True)
    )
    back = sum(_input_sums(program, node, name, labels, assignment, mesh) for name, labels in node.inputs)
    partial = [axis for label in node.summed for axis in assignment.get(label, ())]
    size = program.values[node.output[0]].bytes / mesh.parts(output)
    compute = _compute(program, node, assignment, mesh, table)
    base = gradients / micro_batches + back
    found = [
        Strategy(
            assignment=assignment,
            inputs=inputs,
            output=output,
            compute=compute,
            messages=base + sum(mesh.seconds("all-reduce", size, axis) for axis in partial),
            weight_bytes=sum(weights),
        )
    ]
    for axis in partial:
        for place, label in enumerate(node.output[1]):
            dim = (*output[place], axis)
            if label not in ("b", "t") or output[place] or not _divides(program, node, label, dim, mesh):
                continue
            rest = sum(mesh.seconds("all-reduce", size, other) for other in partial if other != axis)
            # forward a reduce-scatter; its gradient comes back by an all-gather instead of being there
            scatter = mesh.seconds("reduce-scatter", size, axis) + mesh.seconds("all-gather", size, axis)
            found.append(
                Strategy(
                    assignment=assignment,
                    inputs=inputs,
                    output=(*output[:place], dim, *output[place + 1 :]),
                    scattered=axis,
                    compute=compute,
                    messages=base + rest + scatter,
                    weight_bytes=sum(weights),
                )
            )
    return found


def _gradient_sums(
    program: Program, name: str, spec: Spec, assignment: Mapping[str, Dim], labels: tuple[str, ...], mesh: Mesh
) -> float:
    """Seconds of the sums of a weight's gradient over the axes that divide rows and tokens but not the weight."""
    value = program.values[name]
    if not value.weight:
        return 0.0
    size = value.bytes / mesh.parts(spec)
    axes = [axis for label, dim in assignment.items() if label not in labels for axis in dim]
    return sum(mesh.seconds("all-reduce", size, axis) for axis in axes)


def _input_sums(
    program: Program, node: Node, name: str, labels: tuple[str, ...], assignment: Mapping[str, Dim], mesh: Mesh
) -> float:
    """Seconds of the sums of an input's gradient, over labels of the output that the input lacks."""
    value = program.values[name]
    if value.weight or name not in program.producers():
        return 0.0
    size = value.bytes / mesh.parts(spec_of(labels, assignment))
    axes = [axis for label, dim in assignment.items() if label not in labels for axis in dim]
    return sum(mesh.seconds("all-reduce", size, axis) for axis in axes)


def _compute(program: Program, node: Node, assignment: Mapping[str, Dim], mesh: Mesh, table: MachineTable) -> float:
    """Seconds of a device's part, forward and backward."""
    pieces = 1
    for dim in assignment.values():
        for axis in dim:
            pieces *= mesh.sizes[axis]
    moved = node.moved * table.elementwise / table.copy_rate / pieces
    if not node.flops:
        return moved
    if node.kind == "attention":
        heads = node.units.get("h", 1)
        dim = program.size(node, "h") // heads
        scores = program.size(node, "b") * heads * program.size(node, "t") * program.size(node, "s") / pieces
        return sum(table.attention_seconds(node.flops / pieces, scores, dim))
    local: dict[str, float] = {label: program.size(node, label) for label in node.labels}
    for label, dim in assignment.items():
        for axis in dim:
            local[label] /= mesh.sizes[axis]
    outputs, inputs = local.get("o", local.get("e", 1)), local.get("i", 1)
    rows = local.get("b", 1) * local.get("t", 1)
    return 3 * local.get("n", 1) * table.matmul_seconds(max(rows, 1), max(outputs, 1), max(inputs, 1)) + moved
