"""An intermediate representation for sharding: operations whose tensors' dimensions have labels.

A linear layer reads x(b, t, i) and w(i, o) and returns y(b, t, o). Dividing a label over an axis of the device mesh divides every
tensor that has it; dividing i, over which is summed, leaves partial sums of y. So one assignment label → mesh axes says how an
operation runs (Xu et al. 2021, GSPMD, section 3), and what it reads and returns follows.

Labels: b rows, t tokens, e model width, i inputs and o outputs of a matmul, h heads' channels, s keys, v vocabulary, n experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from luban.core.opgraph import ITEMSIZE, Op, OpGraph

Labels = tuple[str, ...]
Dim = tuple[int, ...]  # mesh axes that divide a dimension, outer first; (): none
Spec = tuple[Dim, ...]  # of each dimension of a tensor


@dataclass(frozen=True, kw_only=True)
class Value:
    """A tensor."""

    name: str
    sizes: tuple[int, ...]
    itemsize: int
    weight: bool = False  # a parameter: it has a gradient to be summed, and no producer
    role: str = ""

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        size = self.itemsize
        for dim in self.sizes:
            size *= dim
        return size


@dataclass(frozen=True, kw_only=True)
class Node:
    """An operation."""

    name: str
    kind: str
    inputs: tuple[tuple[str, Labels], ...]  # values with the labels of their dimensions
    output: tuple[str, Labels]
    fixed: frozenset[str] = frozenset()  # labels that can't be divided
    units: Mapping[str, int] = field(default_factory=dict)  # label → number of pieces it has (heads); else its size
    flops: float = 0.0  # of the forward pass
    moved: float = 0.0  # bytes that element-wise work reads and writes, forward and backward

    @property
    def labels(self) -> Labels:
        """Every label, those of the output first."""
        return tuple(dict.fromkeys([*self.output[1], *(label for _, labels in self.inputs for label in labels)]))

    @property
    def summed(self) -> frozenset[str]:
        """Labels that are summed over: those that the output lacks."""
        return frozenset(self.labels) - frozenset(self.output[1])

    def __str__(self) -> str:
        reads = ", ".join(f"{name}({' '.join(labels)})" for name, labels in self.inputs)
        return f"{self.output[0]}({' '.join(self.output[1])}) = {self.kind} {reads}"


@dataclass(frozen=True, kw_only=True)
class Program:
    """Operations in an order in which they can run."""

    nodes: tuple[Node, ...]
    values: Mapping[str, Value]

    def producers(self) -> dict[str, Node]:
        """Value → the node that returns it."""
        return {node.output[0]: node for node in self.nodes}

    def edges(self) -> Iterator[tuple[Node, Node, str, Labels]]:
        """(producer, consumer, value, the consumer's labels of it) of every tensor that one node hands to another."""
        made = self.producers()
        for node in self.nodes:
            for name, labels in node.inputs:
                if name in made:
                    yield made[name], node, name, labels

    def size(self, node: Node, label: str) -> int:
        """Elements along a label."""
        for name, labels in (*node.inputs, node.output):
            if label in labels:
                return self.values[name].sizes[labels.index(label)]
        raise KeyError(label)

    def lines(self, specs: Mapping[str, Spec] | None = None) -> list[str]:
        """A line an operation, with shapes, and specs where they are known."""
        return [f"  {node}  {self._shape(node, specs or {})}" for node in self.nodes]

    def _shape(self, node: Node, specs: Mapping[str, Spec]) -> str:
        value = self.values[node.output[0]]
        if value.name not in specs:
            return " × ".join(map(str, value.sizes))
        parts = (
            f"{size}{'/' + ','.join(f'mesh{a}' for a in dim) if dim else ''}"
            for size, dim in zip(value.sizes, specs[value.name], strict=True)
        )
        return " × ".join(parts)


def spec_of(labels: Labels, assignment: Mapping[str, Dim]) -> Spec:
    """The spec of a tensor under an assignment of its labels."""
    return tuple(assignment.get(label, ()) for label in labels)


def program_of(graph: OpGraph, rows: int = 1) -> Program:
    """The operations of a graph of one row, for so many rows. What isn't understood (biases of positions, routers) is left out: it
    is small, and every device computes it whole."""
    builder = _Builder(graph, rows)
    for op in graph.ops:
        builder.add(op)
    return Program(nodes=tuple(builder.nodes), values=builder.values)


class _Builder:
    def __init__(self, graph: OpGraph, rows: int):
        self.graph, self.rows = graph, rows
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        for value in graph.inputs:
            self._value(value.name, self._sizes(value.shape), ITEMSIZE[value.dtype])

    def add(self, op: Op) -> None:
        """Record an operation and its output."""
        make = getattr(self, f"_{op.kind}", None)
        if make is not None and op.role != "router":
            make(op)

    def _sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] * self.rows, *shape[1:])

    def _value(self, name: str, sizes: tuple[int, ...], itemsize: int, *, weight: bool = False, role: str = "") -> None:
        self.values[name] = Value(name=name, sizes=sizes, itemsize=itemsize, weight=weight, role=role)

    def _node(self, op: Op, inputs: list[tuple[str, str]], output: str, sizes: tuple[int, ...], **fields) -> None:
        known = [(name, tuple(labels.split())) for name, labels in inputs if name in self.values]
        self._value(op.name, sizes, ITEMSIZE[op.dtype])
        self.nodes.append(
            Node(
                name=op.name,
                kind=op.kind,
                inputs=tuple(known),
                output=(op.name, tuple(output.split())),
                flops=float(self.rows * op.flops * op.mask_density),
                **fields,
            )
        )

    def _weight(self, op: Op, *sizes: int) -> str:
        name = f"{op.name}.weight"
        self._value(name, sizes, self.graph.itemsize, weight=True, role=op.role)
        return name

    def _linear(self, op: Op) -> None:
        source = op.inputs[0]
        if op.role == "expert":
            experts = max(round(op.parameters / (op.in_features * op.out_features)), 1)
            rows = self.rows * op.output.elements // op.out_features // experts
            weight = self._weight(op, experts, op.in_features, op.out_features)
            self._node(op, [(source, "n b i"), (weight, "n i o")], "n b o", (experts, rows, op.out_features))
            return
        weight = self._weight(op, op.in_features, op.out_features)
        units = self._heads(op)
        self._node(op, [(source, "b t i"), (weight, "i o")], "b t o", self._sizes(op.shape), units=units)

    _lm_head = _linear

    def _heads(self, op: Op) -> dict[str, int]:
        """Projections of attention are divided by whole heads."""
        heads = self._read_as_heads(op)
        if heads and op.role in ("q", "k", "v"):
            return {"o": heads}
        made = next((o for o in self.graph.ops if o.name == op.inputs[0]), None)
        return {"i": made.heads} if made is not None and made.kind == "attention" else {}

    def _read_as_heads(self, op: Op) -> int:
        """Heads of the attention that reads a tensor, maybe after a norm of each head; 0: none does."""
        for consumer in self.graph.consumers(op.name):
            heads = consumer.heads if consumer.kind == "attention" else 0
            if consumer.kind == "norm" and len(consumer.shape) == 4:
                heads = self._read_as_heads(consumer)
            if heads:
                return heads
        return 0

    def _attention(self, op: Op) -> None:
        batch, heads, tokens, dim = op.shape
        sizes = (batch * self.rows, tokens, heads * dim)
        labels = ["b t h", "b s h", "b s h"]
        reads = list(zip(op.inputs[:3], labels, strict=True))
        self._node(op, reads, "b t h", sizes, units={"h": heads}, fixed=frozenset("s"))

    def _elementwise(self, op: Op, passes: float, labels: str = "", **fields) -> None:
        shape = self.values[op.inputs[0]].sizes if op.inputs[0] in self.values else self._sizes(op.shape)
        labels = labels or ("b t e" if len(op.shape) == 3 else "n b e")
        size = ITEMSIZE[op.dtype]
        for dim in shape:
            size *= dim
        self._node(op, [(name, labels) for name in op.inputs], labels, shape, moved=passes * size, **fields)

    def _norm(self, op: Op) -> None:
        if len(op.shape) == 4:  # (B, T, H, D): of each head by itself, so heads may be divided
            self._elementwise(op, 6, "b t h", units={"h": self._read_as_heads(op) or op.shape[2]})
        else:
            self._elementwise(op, 6, fixed=frozenset("e"))

    def _activation(self, op: Op) -> None:
        self._elementwise(op, 8)

    def _add(self, op: Op) -> None:
        self._elementwise(op, 3)

    def _embedding(self, op: Op) -> None:
        if op.inputs[0] not in self.values or len(self.values[op.inputs[0]].sizes) != 2:
            return self._elementwise(op, 2)
        width = op.shape[-1]
        table = self._weight(op, max(op.parameters // width, 1), width)
        self._node(op, [(op.inputs[0], "b t"), (table, "v e")], "b t e", self._sizes(op.shape))
        return None

    def _gather(self, op: Op) -> None:
        reader = self.graph.consumers(op.name)[0]
        experts = max(round(reader.parameters / (reader.in_features * reader.out_features)), 1)
        sizes = (experts, self.rows * op.shape[0] // experts, op.shape[1])
        self._node(op, [(op.inputs[0], "b t e")], "n b e", sizes, fixed=frozenset("nte"))

    def _combine(self, op: Op) -> None:
        self._node(op, [(op.inputs[0], "n b e")], "b t e", self._sizes(op.shape), fixed=frozenset("nte"))
