"""Seconds and bytes of a model's layers for one micro-batch on one process of a plan, each kind of layer once.

S bytes of hidden states between layers, R rows of a micro-batch. The graph is that of one row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from luban.core.opgraph import Op, OpGraph
from luban.planner.machine import MachineTable
from luban.planner.memory import StepSettings, gathered_elements, joint_parameters, layer_saved_bytes, score_count
from luban.planner.search.messages import Axis, Messages
from luban.planner.step_time import ACTIVATION, EMBEDDING, LM_HEAD, NORM, RESIDUAL, ROTATED
from luban.planner.traffic import DIVIDED

FORWARD = 1 / 3  # share of an operation's reads and writes


@dataclass(frozen=True)
class Slice:
    """How a micro-batch's work is divided."""

    rows: int
    tensor: int = 1
    context: int = 1
    expert: int = 1


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of a layer, or of what stands before or behind the layers, for one micro-batch."""

    forward: float = 0.0  # seconds, messages of the axes tensor, context and expert included
    backward: float = 0.0
    messages: float = 0.0  # seconds of those, forward and backward
    elementwise: float = 0.0  # seconds of element-wise operations in a forward pass, which "selective" computes again
    flops: float = 0.0  # of the forward pass, on all processes together

    def __add__(self, other: Costs) -> Costs:
        return Costs(**{name: getattr(self, name) + getattr(other, name) for name in vars(self)})

    def times(self, number: float) -> Costs:
        """Of so many such layers."""
        return Costs(**{name: number * value for name, value in vars(self).items()})


class Model:
    """A model's graph of one row, cut into kinds of layers.

    Args:
        settings: trainer settings without recomputation.
        precision: of the matmuls.
    """

    def __init__(self, graph: OpGraph, settings: StepSettings, table: MachineTable, messages: Messages, precision: str):
        self.graph, self.settings, self.table = graph, settings, table
        self.messages, self.precision = messages, precision
        layers = graph.layers()
        kinds: dict[tuple[object, ...], int] = {}
        self.layers: list[OpGraph] = []  # one of each kind
        self.kind_of: list[int] = []  # of each layer
        for name, layer in layers.items():
            kind = tuple(_shape(op, name) for op in layer.ops)
            if kind not in kinds:
                kinds[kind] = len(self.layers)
                self.layers.append(layer)
            self.kind_of.append(kinds[kind])
        self.before = [op for op in graph.ops if not op.layer and op.kind in ("embedding", "bias")]
        self.behind = [op for op in graph.ops if not op.layer and op.kind not in ("embedding", "bias")]
        self._costs: dict[tuple[int, Slice], Costs] = {}

    def with_messages(self, messages: Messages) -> Model:
        """The same model, its messages priced in another way."""
        return Model(self.graph, self.settings, self.table, messages, self.precision)

    @cached_property
    def hidden(self) -> int:
        """S of one row."""
        return self.graph.itemsize * (self.layers[0].ops[-1].output.elements if self.layers else 0)

    @cached_property
    def row_flops(self) -> float:
        """Training FLOPs of one row, without recomputation and of attention only what the mask leaves."""
        return self.graph.model_flops / self.graph.batch

    @cached_property
    def joined(self) -> list[int]:
        """Bytes of the weights that each kind of layer saves side by side, whatever the rows, where nothing is recomputed."""
        joins = self.settings.gpu_kernels and self.settings.remat == "none"
        return [self.graph.itemsize * joint_parameters(layer) if joins else 0 for layer in self.layers]

    @cached_property
    def saved(self) -> list[int]:
        """Bytes that each kind of layer saves of one row, nothing recomputed, without `joined`."""
        whole = [layer_saved_bytes(layer, self.settings) for layer in self.layers]
        return [size - weights for size, weights in zip(whole, self.joined, strict=True)]

    @cached_property
    def gathered(self) -> list[int]:
        """Bytes of one row that each kind of layer gathers whole under the axis tensor and saves, nothing recomputed."""
        return [self.graph.itemsize * gathered_elements(layer) for layer in self.layers]

    @cached_property
    def saved_selectively(self) -> list[int]:
        """The same under the policy "selective"."""
        return [layer_saved_bytes(layer, replace(self.settings, remat="selective")) for layer in self.layers]

    def costs(self, kind: int, cut: Slice) -> Costs:
        """Of a kind of layer; −1: what stands before the layers, −2: behind them."""
        key = (kind, cut)
        if key not in self._costs:
            ops = self.before if kind == -1 else self.behind if kind == -2 else list(self.layers[kind].ops)
            self._costs[key] = self._of(ops, cut, inside=kind >= 0)
        return self._costs[key]

    def _of(self, ops: list[Op], cut: Slice, *, inside: bool) -> Costs:
        forward = backward = elementwise = flops = 0.0
        done: set[str] = set()
        for op in ops:
            flops += cut.rows * op.flops * op.mask_density
            if op.kind == "attention":
                there, back = self._attention(op, cut)
            elif op.in_features and op.fusion_group and op.fusion_group in done:
                there = back = 0.0
            elif op.in_features:
                done.add(op.fusion_group)
                there = self._matmul(op, [o for o in ops if o.fusion_group == op.fusion_group != ""] or [op], cut)
                back = 2 * there
            else:
                there = back = 0.0
            moved = self._moved(op, cut)
            elementwise += FORWARD * moved
            forward, backward = forward + there + FORWARD * moved, backward + back + (1 - FORWARD) * moved
        messages = self._messages(ops, cut) if inside else self._edge_messages(ops, cut)
        return Costs(
            forward=forward + messages / 2,
            backward=backward + messages / 2,
            messages=messages,
            elementwise=elementwise,
            flops=flops,
        )

    def _matmul(self, op: Op, joint: list[Op], cut: Slice) -> float:
        """Seconds of the forward matmul of an operation and those that are computed with it."""
        outputs, inputs = sum(o.out_features for o in joint), op.in_features
        tokens = cut.rows * op.output.elements / max(op.out_features, 1) / cut.context
        if op.role == "expert":
            experts = max(round(op.parameters / (inputs * op.out_features)), 1)
            if cut.expert == 1:
                inputs, outputs = _divided(op, inputs, outputs, cut.tensor)
            else:  # an expert sees the rows of all processes that divide the experts
                tokens *= cut.expert / cut.tensor
            each = self.table.matmul_seconds(max(tokens / experts, 1), outputs, inputs, self.precision)
            return experts / cut.expert * each
        if op.role in DIVIDED:
            inputs, outputs = _divided(op, inputs, outputs, cut.tensor)
        return self.table.matmul_seconds(max(tokens, 1), max(outputs, 1), max(inputs, 1), self.precision)

    def _attention(self, op: Op, cut: Slice) -> tuple[float, float]:
        parts = min(cut.tensor, max(op.heads, 1)) * cut.context
        flops = cut.rows * op.flops * op.mask_density / parts
        return self.table.attention_seconds(flops, cut.rows * score_count(op) / parts, op.head_dim)

    def _moved(self, op: Op, cut: Slice) -> float:
        """Seconds of reads and writes outside of matmuls and attention, forward and backward."""
        passes = {"norm": NORM, "activation": ACTIVATION, "embedding": EMBEDDING, "lm_head": LM_HEAD}.get(op.kind, 0)
        divided = op.kind in ("activation", "lm_head") or op.role in ("q", "k", "v")
        if op.role in ("o", "down"):
            passes = RESIDUAL
        if op.role in ("q", "k", "v"):
            passes = ROTATED
        parts = cut.context * (cut.tensor if divided or self.table.sequence_parallel else 1)
        size = self.graph.itemsize * cut.rows * op.saved_elements * passes * self.table.elementwise
        return size / parts / self.table.copy_rate

    def _messages(self, ops: list[Op], cut: Slice) -> float:
        """Of one layer: four all-reduces of the hidden states along tensor, keys and values round the ring of context, rows to
        experts and back."""
        states = cut.rows * self.hidden / cut.context
        parts = sum(op.role in ("o", "down") or op.kind == "combine" for op in ops)
        found = 2 * parts * self.messages.seconds("all-reduce", states, Axis(cut.tensor, 1))
        if cut.context > 1:
            ring = Axis(cut.context, cut.tensor)
            for op in ops:
                if op.kind == "attention":
                    keys = cut.rows * self.graph.itemsize * 2 * op.shape[0] * op.shape[2] * op.key_heads * op.head_dim
                    sent = keys / cut.context / min(cut.tensor, max(op.key_heads, 1))
                    found += 4 * (cut.context - 1) * self.messages.seconds("send", sent, ring)
        if cut.expert > 1:
            rows = sum(op.output.elements for op in ops if op.kind == "gather")
            sent = cut.rows * self.graph.itemsize * rows / cut.context / cut.tensor
            found += 4 * self.messages.seconds("all-to-all", sent, Axis(cut.expert, 1))
        return found

    def _edge_messages(self, ops: list[Op], cut: Slice) -> float:
        """Of embeddings or the output layer, whose vocabulary is divided along tensor."""
        states = cut.rows * self.hidden / cut.context
        return len(ops[:1]) * self.messages.seconds("all-reduce", states, Axis(cut.tensor, 1))


def _divided(op: Op, inputs: float, outputs: float, tensor: int) -> tuple[float, float]:
    """Sizes of the part of a weight that one process of the axis tensor has."""
    return (inputs / tensor, outputs) if op.role in ("o", "down") else (inputs, outputs / tensor)


def _shape(op: Op, layer: str) -> tuple[object, ...]:
    """What makes layers alike: everything but names."""
    fields = {
        name: value for name, value in vars(op).items() if name not in ("name", "inputs", "layer", "fusion_group")
    }
    return (op.name.removeprefix(layer), *fields.values())
