"""Sharding specs of a few tensors completed to all (Xu et al. 2021, GSPMD, section 3.5).

Each operation's labels take the axes that its tensors have, and hand them to its other tensors, forward and backward, until
nothing changes. Element-wise operations go first, as they lose nothing. What a tensor has been given stays; an axis divides a tensor
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from luban.core.errors import ConfigError
from luban.planner.sharding.ir import Dim, Labels, Node, Program, Spec

ELEMENTWISE = ("add", "activation", "norm")


@dataclass(frozen=True, kw_only=True)
class Sharded:
    """A program with the spec of every tensor, and how each node runs."""

    program: Program
    specs: dict[str, Spec]
    assignments: dict[str, dict[str, Dim]]  # node → label → axes


def propagate(program: Program, annotated: Mapping[str, Spec], mesh: tuple[int, ...]) -> Sharded:
    """Complete the specs of `annotated` tensors to all.

    Raises:
        ConfigError: an annotation names an unknown tensor, divides unevenly, or uses an axis twice.
    """
    for name, spec in annotated.items():
        _check(program, name, spec, mesh)
    specs = dict(annotated)
    changed = True
    while changed:
        changed = False
        for only_elementwise in (True, False):
            for nodes in (program.nodes, program.nodes[::-1]):
                for node in nodes:
                    if only_elementwise == (node.kind in ELEMENTWISE):
                        changed |= _visit(program, node, specs, annotated, mesh)
    for name, value in program.values.items():
        specs.setdefault(name, ((),) * len(value.sizes))
    return Sharded(
        program=program,
        specs=specs,
        assignments={node.name: assignment(program, node, specs, mesh) for node in program.nodes},
    )


def assignment(program: Program, node: Node, specs: Mapping[str, Spec], mesh: tuple[int, ...]) -> dict[str, Dim]:
    """Label → axes of a node, by what its tensors have: the output's go first, then those of weights, then of inputs."""
    weights = [pair for pair in node.inputs if program.values[pair[0]].weight]
    others = [pair for pair in node.inputs if not program.values[pair[0]].weight]
    found: dict[str, Dim] = {}
    used: set[int] = set()
    for name, labels in (node.output, *weights, *others):
        for label, dim in zip(labels, specs.get(name, ((),) * len(labels)), strict=True):
            if dim and label not in found and not used & {*dim} and _divides(program, node, label, dim, mesh):
                found[label] = dim
                used |= {*dim}
    return found


def _visit(
    program: Program, node: Node, specs: dict[str, Spec], annotated: Mapping[str, Spec], mesh: tuple[int, ...]
) -> bool:
    """Hand a node's axes to its tensors. Returns whether one has changed."""
    found, changed = assignment(program, node, specs, mesh), False
    for name, labels in (node.output, *node.inputs):
        if name in annotated:
            continue
        before = specs.get(name, ((),) * len(labels))
        after = _merged(before, labels, found)
        if after != before:
            specs[name], changed = after, True
    return changed


def _merged(before: Spec, labels: Labels, found: Mapping[str, Dim]) -> Spec:
    """A tensor's spec with axes that a node has for dimensions that are whole."""
    used = {axis for dim in before for axis in dim}
    after = []
    for dim, label in zip(before, labels, strict=True):
        new = found.get(label, ())
        if not dim and new and not used & {*new}:
            dim, used = new, used | {*new}
        after.append(dim)
    return tuple(after)


def _divides(program: Program, node: Node, label: str, dim: Dim, mesh: tuple[int, ...]) -> bool:
    """Whether a node can divide a label over these axes."""
    pieces = 1
    for axis in dim:
        pieces *= mesh[axis]
    return label not in node.fixed and node.units.get(label, program.size(node, label)) % pieces == 0


def _check(program: Program, name: str, spec: Spec, mesh: tuple[int, ...]) -> None:
    if name not in program.values:
        raise ConfigError(f"there is no tensor {name} to annotate")
    sizes, used = program.values[name].sizes, [axis for dim in spec for axis in dim]
    if len(spec) != len(sizes):
        raise ConfigError(f"{name} has {len(sizes)} dimensions, and its spec {len(spec)}")
    if len(used) != len(set(used)) or any(axis not in range(len(mesh)) for axis in used):
        raise ConfigError(f"the spec of {name} must use each of the mesh's {len(mesh)} axes once at most")
    for size, dim in zip(sizes, spec, strict=True):
        pieces = 1
        for axis in dim:
            pieces *= mesh[axis]
        if size % pieces:
            raise ConfigError(f"{pieces} devices can't divide the {size} of {name} evenly")
