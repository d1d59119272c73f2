"""The roofline of a model's forward (Williams et al. 2009): each operation's FLOPs and bytes, and which of the two bounds it.

Bytes are those that an operation must move between memory and chip when it runs by itself: inputs and weights read once, its
output written once. What fusing saves is the difference to the same arithmetic as separate operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf, prod

from luban.core.opgraph import ITEMSIZE, Op, OpGraph
from luban.core.units import bytes_, count, fine_seconds

FP32 = 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Roof:
    """What a device can do."""

    flops: float  # a second, of matmuls
    bandwidth: float  # bytes a second

    @property
    def ridge(self) -> float:
        """FLOPs a byte above which matmuls, and not memory, bound an operation."""
        return self.flops / self.bandwidth

    def seconds(self, flops: float, moved: float) -> float:
        """The least time of an operation."""
        return max(flops / self.flops, moved / self.bandwidth)


@dataclass(frozen=True, kw_only=True)
class Point:
    """An operation, or several alike, on the roofline."""

    name: str  # of the first
    kind: str
    count: int  # how many are alike
    flops: int  # of one
    bytes: int  # of one
    measured: float | None = None  # seconds of one; None: not measured by itself

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / max(self.bytes, 1)

    def bound(self, roof: Roof) -> str:
        """What bounds it: "compute" or "memory"."""
        return "compute" if self.intensity >= roof.ridge else "memory"


def points(graph: OpGraph, measure: Callable[[Op], float | None] | None = None) -> list[Point]:
    """Every operation of a forward, those alike (in kind, shapes and FLOPs) as one point.

    Args:
        measure: seconds of an operation by itself; asked once for those that are alike.
    """
    alike: dict[tuple[object, ...], list[Op]] = {}
    for op in graph.ops:
        shapes = tuple(graph.value(name).shape for name in op.inputs)
        alike.setdefault((op.kind, op.role, op.shape, shapes, op.flops), []).append(op)
    return [
        Point(
            name=ops[0].name,
            kind=ops[0].kind,
            count=len(ops),
            flops=computed_flops(ops[0]),
            bytes=moved_bytes(ops[0], graph),
            measured=None if measure is None else measure(ops[0]),
        )
        for ops in alike.values()
    ]


def computed_flops(op: Op) -> int:
    """FLOPs that a kernel which skips masked blocks computes; the graph counts the full square of attention."""
    return round(op.flops * op.mask_density)


def moved_bytes(op: Op, graph: OpGraph) -> int:
    """Bytes of inputs, weights and output; of an embedding only the rows that are looked up."""
    read = sum(graph.value(name).elements * ITEMSIZE[graph.value(name).dtype] for name in op.inputs)
    weights = op.in_features * op.out_features or op.parameters
    if op.kind == "embedding":
        weights = prod(op.shape)
    return read + graph.itemsize * weights + op.output_bytes


def attention_traffic(tokens: int, head_dim: int, memory: int) -> tuple[int, int]:
    """Elements that attention of one head moves to and from HBM: as separate operations, and tiled (Dao et al. 2022, theorem 2,
    algorithm 1), load by load and store by store.

    Args:
        memory: elements of on-chip memory, M.
    """
    n, d = tokens, head_dim
    separate = 2 * n * d + n * n  # scores: q and k read, scores written
    separate += 2 * n * n  # softmax: scores read, weights written
    separate += n * n + n * d + n * d  # mixing: weights and v read, output written
    columns = ceil(memory / (4 * d))  # keys of a block
    rows = min(columns, d)  # queries of a block
    tiled = 0
    for key in range(0, n, columns):
        tiled += 2 * d * min(columns, n - key)  # a block of keys and values
        for query in range(0, n, rows):
            size = min(rows, n - query)
            tiled += d * size + 2 * (d * size + 2 * size)  # q read; output, maximum and sum read and written
    return separate, tiled


def traffic_orders(tokens: int, head_dim: int, memory: int) -> tuple[float, float]:
    """FlashAttention's formulas without their constants: Nd + N², and N²d²/M."""
    return tokens * head_dim + tokens**2, tokens**2 * head_dim**2 / memory


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """Something computed as separate operations and as one."""

    name: str
    separate_bytes: int
    fused_bytes: int
    flops: int
    separate_seconds: float | None = None  # measured
    fused_seconds: float | None = None

    def predicted(self, roof: Roof) -> float:
        """Time as separate operations over time fused."""
        separate, fused = (
            max(self.flops / roof.flops, moved / roof.bandwidth) for moved in (self.separate_bytes, self.fused_bytes)
        )
        return separate / fused if fused else inf

    @property
    def measured(self) -> float | None:
        """The same, measured."""
        if self.separate_seconds is None or not self.fused_seconds:
            return None
        return self.separate_seconds / self.fused_seconds


def fusions(
    rows: int, seq: int, width: int, inner: int, heads: int, head_dim: int, vocab: int, itemsize: int
) -> list[Fusion]:
    """What fusing saves in attention, SwiGLU, a norm and the loss of `rows` sequences of `seq` tokens, by bytes alone."""
    tokens = rows * seq
    square, qkv = rows * heads * seq**2, 4 * rows * heads * seq * head_dim
    stream, gates, logits = tokens * width, tokens * inner, tokens * vocab
    return [
        Fusion(
            name="attention",
            separate_bytes=itemsize * (qkv + 4 * square),
            fused_bytes=itemsize * qkv + FP32 * rows * heads * seq,
            flops=4 * square * head_dim,
        ),
        # sigmoid, times the gate, times up; or both read and the product written
        Fusion(name="SwiGLU", separate_bytes=itemsize * 8 * gates, fused_bytes=itemsize * 3 * gates, flops=0),
        # square, mean, inverse root, times x, times the weight; or read and written
        Fusion(name="norm", separate_bytes=itemsize * 7 * stream, fused_bytes=itemsize * 2 * stream, flops=0),
        # logits written and read for their maximum, their sum and the target; or never outside of the chip
        Fusion(
            name="loss",
            separate_bytes=itemsize * (stream + width * vocab + 2 * logits) + 2 * FP32 * logits,
            fused_bytes=itemsize * (stream + width * vocab),
            flops=2 * stream * vocab,
        ),
    ]


def table(found: Sequence[Point], roof: Roof) -> str:
    """The points by time, those that take longest first, each of one operation, and the sum of all operations, as text."""
    head = f"{'operation':<44} {'times':>5} {'FLOPs':>9} {'moved':>9} {'FLOP/B':>8} {'bound':>8} {'least':>9} {'measured':>9} {'of roof':>8}"
    lines = [head]
    for point in sorted(found, key=lambda each: -each.count * (each.measured or roof.seconds(each.flops, each.bytes))):
        least = roof.seconds(point.flops, point.bytes)
        measured = "" if point.measured is None else fine_seconds(point.measured)
        share = "" if not point.measured else f"{least / point.measured:.0%}"
        lines.append(
            f"{point.name:<44} {point.count:>5} {count(point.flops):>9} {bytes_(point.bytes):>9} {point.intensity:>8.1f} "
            f"{point.bound(roof):>8} {fine_seconds(least):>9} {measured:>9} {share:>8}"
        )
    times = sum(each.count for each in found)
    flops, moved = sum(each.count * each.flops for each in found), sum(each.count * each.bytes for each in found)
    least = sum(each.count * roof.seconds(each.flops, each.bytes) for each in found)
    measured = fine_seconds(sum(each.count * (each.measured or 0.0) for each in found))
    whole = all(each.measured is not None for each in found)
    lines.append(
        f"{'all, one after another':<44} {times:>5} {count(flops):>9} {bytes_(moved):>9} {flops / max(moved, 1):>8.1f} "
        f"{'':>8} {fine_seconds(least):>9} {measured if whole else '':>9}".rstrip()
    )
    return "\n".join(lines)


def fusion_table(found: Sequence[Fusion], roof: Roof) -> str:
    """What fusing buys, as text."""
    lines = [f"{'fused':<12} {'separate':>10} {'one':>10} {'predicted':>10} {'measured':>10}"]
    for each in found:
        measured = "" if each.measured is None else f"{each.measured:.2f}×"
        lines.append(
            f"{each.name:<12} {bytes_(each.separate_bytes):>10} {bytes_(each.fused_bytes):>10} "
            f"{each.predicted(roof):>9.2f}× {measured:>10}"
        )
    return "\n".join(lines)
