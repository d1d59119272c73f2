"""Bytes that one process of a plan sends in a step, collective by collective.

Of a collective over N processes on K bytes each sends (N − 1)/N·K (all-gather, reduce-scatter) or twice that (all-reduce), as
ring algorithms do, which is the least there can be. So ZeRO sends 2Ψ, 2Ψ and 3Ψ numbers times (N − 1)/N at its stages 1, 2
and 3 (Rajbhandari et al. 2020, section 7), and a tensor-parallel layer as much as four all-reduces of its hidden states
(Shoeybi et al. 2020, section 3), each of which sequence parallelism cuts into an all-gather and a reduce-scatter.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

from luban.core.opgraph import Op, OpGraph
from luban.core.plan import ParallelPlan
from luban.planner.pipeline.routes import Routes, stage_parts

DIVIDED = frozenset({"q", "k", "v", "o", "gate", "up", "down", "lm_head"})  # roles that the axis tensor divides
STATISTICS = (
    4  # numbers that processes exchange of every row of logits: the highest, a sum, the target's, all logits' sum
)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one kind of message along one axis amounts to in a step."""

    axis: str  # of the plan
    collective: str  # all-reduce, all-gather, reduce-scatter, all-to-all, send
    what: str
    bytes: int  # that one process sends
    count: int = 0  # messages; 0: as many as buckets or layers make them


@dataclass(frozen=True)
class Spread:
    """A model's operations over the processes of a plan.

    Args:
        graph: of one micro-batch as one reader sees it, all tokens of its rows included.
        pieces: micro-batches of a step.
        weight_bytes: of a number in the matmuls; `gradient_bytes`: as gradients are summed.
    """

    graph: OpGraph
    plan: ParallelPlan
    pieces: int
    weight_bytes: int
    gradient_bytes: int = 4

    def process_ops(self, process: int) -> list[Op]:
        """The operations of one process of the pipeline. Those outside of layers go with the next layer, or the last."""
        names = list(self.graph.layers())
        stage_of = {}
        for stage, (begin, end) in enumerate(self.plan.stage_runs(len(names))):
            stage_of |= dict.fromkeys(names[begin:end], stage)
        found, stage = [], self.plan.stages - 1
        for op in reversed(self.graph.ops):
            stage = stage_of.get(op.layer, stage)
            if stage % self.plan.pipeline == process:
                found.append(op)
        return found[::-1]

    def held(self, op: Op) -> int:
        """The parameters of an operation that one process of the axis tensor has, of several the one with the most."""
        tensor = self.plan.tensor
        if op.role == "expert":
            return ceil(op.parameters / (self.plan.expert if self.plan.expert > 1 else tensor))
        if op.role in ("k", "v"):
            heads = next((o.key_heads for o in self.graph.consumers(op.name) if o.key_heads), tensor)
            return ceil(op.parameters / heads) * ceil(heads / tensor)
        return ceil(op.parameters / tensor) if op.role in DIVIDED or _is_vocabulary(op) else op.parameters

    def parameters(self, process: int) -> int:
        """Parameters that one process of pipeline and tensor has, before any sharding; a tied output layer's table is held by
        the first and by the last."""
        ops = self.process_ops(process)
        count = sum(self.held(op) for op in ops)
        tied = next(
            (op for op in ops if op.kind == "lm_head" and op.parameters < op.in_features * op.out_features), None
        )
        if tied is not None and not any(_is_vocabulary(op) for op in ops):
            count += ceil(tied.in_features * tied.out_features / self.plan.tensor)
        return count

    def in_layers(self, process: int) -> int:
        """Those of them that are in Transformer layers."""
        return sum(self.held(op) for op in self.process_ops(process) if op.layer)

    def apart(self, process: int) -> tuple[int, int]:
        """Parameters of experts and of routers that a process holds outside of FSDP's shards and of the other gradients' sums."""
        ops = self.process_ops(process)
        experts = sum(self.held(op) for op in ops if op.role == "expert") if self.plan.expert > 1 else 0
        return experts, sum(op.parameters for op in ops if op.role == "router") if self.plan.shard > 1 else 0

    def traffic(self, process: int = 0) -> list[Traffic]:
        """Everything that a process of the pipeline sends in a step, largest first."""
        plan = self.plan
        found = [*self._data(process)]
        if plan.tensor > 1:
            found += self._tensor(process)
        if plan.context > 1:
            found += self._context(process)
        if plan.pipeline > 1:
            found += self._pipeline(process)
        if plan.expert > 1:
            found += self._experts(process)
        return sorted((row for row in found if row.bytes), key=lambda row: -row.bytes)

    def _data(self, process: int) -> Iterable[Traffic]:
        plan, (experts, routers) = self.plan, self.apart(process)
        count = self.parameters(process) - experts - routers
        gradient = count * self.gradient_bytes
        sharded = plan.shard > 1
        shards, copies = (plan.shard * plan.context, plan.replicate) if sharded else (1, plan.replicate * plan.context)
        updates = plan.pipeline > 1 and plan.schedule == "pipedream"  # by every micro-batch
        reductions = self.pieces if updates or (sharded and (plan.zero_stage > 1 or plan.pipeline > 1)) else 1
        if sharded:
            again = (
                self.in_layers(process) - experts - routers if plan.zero_stage == 3 else 0
            )  # the rest stays gathered in between
            weights = (1 if plan.keeps_weights else self.pieces) * _part((count + again) * self.weight_bytes, shards)
            yield Traffic(axis="shard", collective="all-gather", what="weights", bytes=weights)
            # weights that stay whole have gradients that are sent as they are; summed over micro-batches they are wider
            narrow = plan.keeps_weights and (plan.zero_stage == 2 or self.pieces == 1)
            summed = reductions * _part(count * self.weight_bytes if narrow else gradient, shards)
            collective = "all-to-all" if plan.keeps_weights else "reduce-scatter"
            yield Traffic(axis="shard", collective=collective, what="gradients", bytes=summed)
        summed = 2 * reductions * _part(gradient // shards, copies)
        yield Traffic(axis="replicate", collective="all-reduce", what="gradients", bytes=summed)
        for axis, size in (("replicate", copies), ("shard", shards), ("tensor", plan.tensor)):
            summed = 2 * _part(routers * self.gradient_bytes, size)
            yield Traffic(axis=axis, collective="all-reduce", what="gradients of the routers", bytes=summed)

    def _experts(self, process: int) -> Iterable[Traffic]:
        """Rows to the processes that have their experts and back, forward and backward, if every expert gets equally many; and
        the sums of the experts' gradients over those that hold the same."""
        plan, rows, layers = self.plan, 0, 0
        for op in self.process_ops(process):
            if op.kind == "gather":
                rows, layers = rows + op.output.elements // (plan.tensor * plan.context), layers + 1
        times = 4 + 2 * plan.recomputes
        sent = self.pieces * times * _part(rows * self.weight_bytes, plan.expert)
        count = self.pieces * times * layers
        yield Traffic(axis="expert", collective="all-to-all", what="rows of experts", bytes=sent, count=count)
        copies = plan.processes // plan.pipeline // plan.expert
        summed = 2 * _part(self.apart(process)[0] * self.gradient_bytes, copies)
        yield Traffic(axis="expert", collective="all-reduce", what="gradients of experts", bytes=summed)

    def _tensor(self, process: int) -> Iterable[Traffic]:
        plan, ops = self.plan, self.process_ops(process)
        size, layers = plan.tensor, {op.layer for op in ops if op.layer}
        states = self._states() // plan.context
        parts = sum(
            op.role in ("o", "down") or op.kind == "combine" for op in ops
        )  # each ends with a matrix that is divided by rows
        stacks = {layer.rpartition(".")[0] for layer in layers}
        edges = 2 * len(stacks) if plan.pipeline == 1 else int(process == 0) + int(self._is_last(process))
        # what one direction gathers the other scatters; a layer that is computed again doesn't scatter its last part again
        again = plan.recomputes
        gathers, scatters = (2 + again) * parts + edges, (2 + again) * parts - again * len(layers)
        moved = _part(states, size)
        for collective, count in (("all-gather", gathers), ("reduce-scatter", scatters)):
            sent, count = self.pieces * count * moved, self.pieces * count
            yield Traffic(axis="tensor", collective=collective, what="hidden states", bytes=sent, count=count)
        head = next((op for op in ops if op.kind == "lm_head"), None)
        lookups = sum(_is_vocabulary(op) for op in ops)
        if head is not None:
            rows = head.output.elements // head.out_features // plan.context
            numbers = STATISTICS * rows * max(self.weight_bytes, 4)
            yield Traffic(
                axis="tensor", collective="all-reduce", what="loss", bytes=2 * self.pieces * _part(numbers, size)
            )
        between = {"norm"} if plan.shard > 1 else {"norm", "router"}
        norms = sum(op.parameters for op in ops if op.role in between and op.layer) * self.gradient_bytes
        shards = plan.shard * plan.context if plan.shard > 1 else 1
        summed = 2 * _part(norms // shards, size)
        yield Traffic(axis="tensor", collective="all-reduce", what="gradients of the layers' norms", bytes=summed)
        whole = 2 * self.pieces * (lookups + (head is not None)) * moved
        yield Traffic(
            axis="tensor", collective="all-reduce", what="embeddings and gradients of the output layer", bytes=whole
        )

    def _context(self, process: int) -> Iterable[Traffic]:
        """Keys and values go round forward and backward; in the backward pass their gradients go all the way round."""
        ranks, sent = self.plan.context, 0
        for op in self.process_ops(process):
            if op.kind == "attention":
                heads = max(op.key_heads // self.plan.tensor, 1)
                numbers = 2 * op.shape[0] * op.shape[2] // ranks * heads * op.head_dim
                rounds = 3 if self.plan.recomputes else 2
                sent += numbers * (rounds * (ranks - 1) * self.weight_bytes + ranks * max(self.weight_bytes, 4))
        yield Traffic(axis="context", collective="send", what="keys and values", bytes=self.pieces * sent)

    def _pipeline(self, process: int) -> Iterable[Traffic]:
        """Hidden states to other stages and gradients back."""
        plan = self.plan
        sizes: dict[str, tuple[int, int]] = {}  # stack → its layers, and bytes of its hidden states
        for name, layer in self.graph.layers().items():
            stack = name.rpartition(".")[0]
            depth, _ = sizes.get(stack, (0, 0))
            sizes[stack] = depth + 1, self.weight_bytes * layer.ops[-1].output.elements
        depths = [depth for depth, _ in sizes.values()]
        routes = Routes(stage_parts(depths, plan.stage_runs(sum(depths))), plan.pipeline)
        found = {
            "hidden states and gradients": [0, 0],
            "encoder states and gradients, to and from their readers": [0, 0],
        }
        between, straight = found.values()
        for stack, source, target in routes.messages:
            ended = routes.parts[target][stack].finished  # so that its tokens are joined
            size = [*sizes.values()][stack][1] // plan.context // (1 if ended else plan.tensor)
            count = self.pieces * sum(stage % plan.pipeline == process for stage in (source, target))
            row = straight if ended else between
            row[0], row[1] = row[0] + count * size, row[1] + count
        for what, (sent, count) in found.items():
            yield Traffic(axis="pipeline", collective="send", what=what, bytes=sent, count=count)

        if self._tied() and (process == 0 or self._is_last(process)):  # which alone have it
            table = self._tied() // plan.tensor * self.gradient_bytes
            shards = plan.shard * plan.context if plan.shard > 1 else 1
            summed = 2 * _part(table // shards, 2)
            yield Traffic(axis="pipeline", collective="all-reduce", what="gradients of the tied table", bytes=summed)

    def _tied(self) -> int:
        """Numbers of a table that embedding and output layer share; 0: none."""
        head = next((op for op in self.graph.ops if op.kind == "lm_head"), None)
        size = 0 if head is None else head.in_features * head.out_features
        return size if head is not None and head.parameters < size else 0

    def _states(self) -> int:
        """Bytes of the hidden states of a micro-batch between two layers."""
        layer = next(iter(self.graph.layers().values()), None)
        return 0 if layer is None else self.weight_bytes * layer.ops[-1].output.elements

    def _is_last(self, process: int) -> bool:
        return process == (self.plan.stages - 1) % self.plan.pipeline


def _is_vocabulary(op: Op) -> bool:
    """Whether an operation looks up a row a word."""
    return op.kind == "embedding" and (op.name == "embedding" or op.name.endswith("embedding.tokens"))


def _part(size: int, processes: int) -> int:
    """(N − 1)/N of so many bytes."""
    return size * (processes - 1) // processes
