"""Passes over a program; `explained` shows it before and after each.

fuse: element-wise operations go into the matmuls that feed them, as compilers do. shard: specs of a few tensors are completed to all.
collectives: what each node must send is written between the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from luban.core.opgraph import OpGraph
from luban.planner.sharding.ir import Node, Program, Spec, program_of, spec_of
from luban.planner.sharding.propagate import Sharded, propagate


def fuse(program: Program) -> Program:
    """Activations become part of the matmuls that alone feed them, gates and ups of one input as one operation."""
    made, reads = program.producers(), _readers(program)
    nodes: dict[str, Node] = {node.name: node for node in program.nodes}
    for node in program.nodes:
        if node.kind != "activation":
            continue
        sources = [made[name] for name, _ in node.inputs if name in made]
        alone = all(reads[source.output[0]] == 1 and source.kind == "linear" for source in sources)
        if not sources or not alone or len({source.inputs[0] for source in sources}) != 1:
            continue
        first = sources[0]
        inputs = dict.fromkeys(pair for source in sources for pair in source.inputs)
        for source in sources:
            del nodes[source.name]
        nodes[node.name] = replace(
            first,
            name=node.name,
            inputs=tuple(inputs),
            output=(node.output[0], first.output[1]),
            flops=sum(source.flops for source in sources),
            moved=node.moved,
        )
    return replace(program, nodes=tuple(nodes[node.name] for node in program.nodes if node.name in nodes))


def _readers(program: Program) -> dict[str, int]:
    counts = dict.fromkeys(program.values, 0)
    for node in program.nodes:
        for name, _ in node.inputs:
            counts[name] += 1
    return counts


@dataclass(frozen=True, kw_only=True)
class Inserted:
    """A collective between two nodes."""

    collective: str
    value: str
    axis: int
    why: str

    def __str__(self) -> str:
        return f"  {self.collective} of {self.value} over mesh{self.axis}: {self.why}"


def collectives(sharded: Sharded) -> list[Node | Inserted]:
    """The nodes with the collectives of the forward pass between them."""
    program, found = sharded.program, []
    for node in program.nodes:
        running = sharded.assignments[node.name]
        for name, labels in node.inputs:
            if not program.values[name].weight:
                found += _changes(name, sharded.specs[name], spec_of(labels, running), "the node reads it whole")
        found.append(node)
        name, labels = node.output
        made = spec_of(labels, running)
        for label in sorted(node.summed):
            for axis in running.get(label, ()):
                scattered = any(axis in dim for dim in sharded.specs[name])
                what = "reduce-scatter" if scattered else "all-reduce"
                found.append(Inserted(collective=what, value=name, axis=axis, why=f"{label} is divided"))
                if scattered:
                    made = sharded.specs[name]
        found += _changes(name, made, sharded.specs[name], "it is kept whole")
    return found


def _changes(name: str, before: Spec, after: Spec, why: str) -> list[Inserted]:
    """What brings a tensor from one spec to another."""
    found = []
    for axis in sorted({axis for dim in before for axis in dim}):
        here = next(i for i, dim in enumerate(before) if axis in dim)
        there = next((i for i, dim in enumerate(after) if axis in dim), None)
        if there is None:
            found.append(Inserted(collective="all-gather", value=name, axis=axis, why=why))
        elif here != there:
            found.append(Inserted(collective="all-to-all", value=name, axis=axis, why="another dimension is divided"))
    return found


def explained(graph: OpGraph, rows: int, annotated: Mapping[str, Spec], mesh: tuple[int, ...]) -> list[str]:
    """A program before and after each pass, as lines.

    Args:
        annotated: specs of a few tensors; those that the program lacks are passed over.
    """
    program = program_of(graph, rows)
    layer = next((op.layer for op in graph.ops if op.layer), "")
    prefix = f"{layer}." if all(op.layer == layer for op in graph.ops) else ""
    lines = [f"program {prefix.removesuffix('.')}:", *program.lines()]
    program = fuse(program)
    lines += ["", "after fuse:", *program.lines()]
    known = {name: spec for name, spec in annotated.items() if name in program.values}
    sharded = propagate(program, known, mesh)
    given = ", ".join(f"{name} {_written(spec)}" for name, spec in known.items())
    lines += ["", f"after shard over a mesh of {' × '.join(map(str, mesh))}, given {given}:"]
    lines += program.lines(sharded.specs)
    found = collectives(sharded)
    lines += ["", "after collectives:", *(str(each) if isinstance(each, Inserted) else f"  {each}" for each in found)]
    return [line.replace(prefix, "") if number and prefix else line for number, line in enumerate(lines)]


def _written(spec: Spec) -> str:
    return "(" + ", ".join("·".join(f"mesh{a}" for a in dim) or "–" for dim in spec) + ")"


def megatron_annotations(program: Program, *, tokens: str) -> dict[str, Spec]:
    """What has to be said of a program so that propagation finds data and tensor parallelism: rows over mesh0, and of every weight
    whether its outputs (q, k, v, gate, up) or its inputs (o, down) are divided over mesh1.

    Args:
        tokens: the program's input, whose first dimension is rows.
    """
    found: dict[str, Spec] = {}
    for name, value in program.values.items():
        rest = ((),) * (len(value.sizes) - 2)
        if value.role in ("q", "k", "v", "gate", "up", "lm_head"):
            found[name] = (*rest, (), (1,))
        elif value.role in ("o", "down"):
            found[name] = (*rest, (1,), ())
        elif value.role == "expert":
            found[name] = ((0,), (), ())
    if tokens in program.values:
        found[tokens] = ((0,), *((),) * (len(program.values[tokens].sizes) - 1))
    return found
