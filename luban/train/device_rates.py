"""What the device that trains can do a second: from the table of accelerators where it is one, otherwise measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from luban.core.opgraph import Op, OpGraph
from luban.kernels.dispatch import RATES, Case, pick
from luban.kernels.limits import query_chunk
from luban.models.spec import ModelSpec
from luban.nn.mixer.base import AttentionShape
from luban.parallel.device import keep_freed_memory
from luban.parallel.precision import COMPUTE
from luban.planner.accelerators import Accelerator, accelerator, accelerator_of
from luban.planner.memory import Setting, computed_share, is_written_out
from luban.planner.step_time import BACKWARD, SUSTAINED, Rates

TABLED_ON = "h100-sxm"  # where the attention kernels' rates were measured
ROUNDS = 5  # of every measurement; the best counts
TOUCHED = 2**22  # elements of the timed sum
WEIGHED = 2**20, 256  # elements of the timed softmax, and of a row of it
# cost of one exp in a compiled element-wise loop, as a multiple of softmax's cost per element (casts, masking and
# reductions included)
AROUND = 5.0
BUSY = 0.8  # of its threads' time: below it a measurement had to share the machine
MEASURED = 2 * 10**10  # FLOPs of the timed products, at most


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device, as far as predictions and reports need it."""

    name: str  # as torch gives it
    accelerator: Accelerator | None  # its row of the table, where it has one

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """This device."""
        if device.type != "cuda":
            return cls(name=f"{device.type}, {torch.get_num_threads()} threads", accelerator=None)
        name = torch.cuda.get_device_name(device)
        return cls(name=name, accelerator=accelerator_of(name))

    def peak_flops(self, precision: str) -> float | None:
        """FLOP/s that utilisation refers to; fp8's refers to bf16's, so that one model has one scale."""
        row = self.accelerator
        return None if row is None else row.peak_flops("bf16" if precision == "fp8" else precision)


def rates(
    machine: Machine,
    device: torch.device,
    precision: str,
    spec: ModelSpec,
    graph: OpGraph,
    setting: Setting,
    documents: bool = True,
    kernel: str | None = None,
) -> Rates:
    """What the device does a second with this model.

    Args:
        graph: one micro-batch.
        documents: rows hold several, which only some kernels of attention can keep apart.
        kernel: of attention, asked for by name.
    """
    path = attention_path(device, precision, spec, documents, kernel)
    if machine.accelerator is None:
        return measured(device, COMPUTE[precision], graph, setting)
    return tabled(machine.accelerator, precision, path, first_attention(spec).head_dim)


def first_attention(spec: ModelSpec) -> AttentionShape:
    """Of the first layer that attends; of heads of the model's width where none does."""
    shapes = (layer.mixer.attention(spec.width) for layer in (*spec.layers, *spec.encoder))
    return next((shape for shape in shapes if shape is not None), AttentionShape(1, 1, spec.width))


def attention_path(
    device: torch.device, precision: str, spec: ModelSpec, documents: bool, kernel: str | None = None
) -> str:
    """The kernel that training will use, or near it (a bias of the positions is not looked at, documents are taken to
    be long enough for a list of them).

    Raises:
        UnsupportedError: another was asked for by name, which can't serve.
    """
    on_cuda, shape = device.type == "cuda", first_attention(spec)
    if documents:
        kind = "packed" if spec.body.causal and shape.window is None else "intervals"
    else:
        kind = "causal" if spec.body.causal else "all"
    case = Case(
        device=device.type,
        dtype=COMPUTE[precision],
        width=shape.head_dim,
        kind=kind,
        block=shape.layout.block if shape.layout else 0,
        capability=torch.cuda.get_device_capability(device) if on_cuda else None,
    )
    return pick(case, kernel)


def tabled(row: Accelerator, precision: str, path: str, head_width: int) -> Rates:
    """The rates of an accelerator of the table, with attention by the kernel `path`."""
    eight = SUSTAINED * row.product_flops("fp8") if precision == "fp8" else None
    compute = "bf16" if precision == "fp8" else precision
    share = row.peak_flops(compute) / accelerator(TABLED_ON).peak_flops("bf16")
    # Work is counted over whole rows, however many documents they hold: so are these rates, those for packs aren't.
    limits = [limit for name, limit in RATES if name == path and limit >= head_width]
    forward, backward = RATES[path, min(limits)] if limits else (40.0, 40.0)  # masks written out: bound by memory
    return Rates(
        products=SUSTAINED * row.product_flops(compute),
        eight=eight,
        forward=1e12 * share * forward,
        backward=1e12 * share * backward,
        bandwidth=row.copy_rate,
        square=not limits,
    )


def measured(device: torch.device, dtype: torch.dtype, graph: OpGraph, setting: Setting) -> Rates:
    """The same by running the model's largest product, one attention, a sum and a softmax."""
    keep_freed_memory(device)  # as in training; else the system's pages are timed
    written = next((op for op in graph.ops if op.kind == "attention" and is_written_out(op, setting)), None)
    if written is None:
        forward, backward = _attention_rates(device, dtype, graph)
    else:
        forward = _batched_rate(device, dtype, written, graph, computed_share(written, graph.seq))
        backward = forward * BACKWARD / 2  # four products: nothing is computed again
    exponentials = 1 / (AROUND * _softmax_time(device)) if device.type == "cpu" else None
    return Rates(
        products=_product_rate(device, dtype, graph),
        forward=forward,
        backward=backward,
        bandwidth=_sum_rate(device, dtype),
        square=True,
        exponentials=exponentials,
    )


def contention(device: torch.device) -> float | None:
    """Share of its threads' time that a product got, where that says that the machine does other work as well."""
    if device.type != "cpu":
        return None
    x = torch.randn(1024, 1024)
    torch.mm(x, x)
    began, used = time.perf_counter(), time.process_time()
    for _ in range(ROUNDS):
        torch.mm(x, x)
    share = (time.process_time() - used) / (time.perf_counter() - began) / torch.get_num_threads()
    return share if share < BUSY else None


def _product_rate(device: torch.device, dtype: torch.dtype, graph: OpGraph) -> float:
    """FLOP/s of the blocks' largest product and the two of its gradients."""
    products = [op for op in graph.ops if op.kind == "linear" and op.activation]
    largest = max(products or graph.ops, key=lambda op: op.flops)
    inputs, outputs = (max(1, side) for side in largest.sides)
    tokens = min(graph.batch * graph.seq, max(256, MEASURED // (6 * inputs * outputs)))
    x, w = torch.randn(tokens, inputs, device=device).to(dtype), torch.randn(outputs, inputs, device=device).to(dtype)
    dy = torch.randn(tokens, outputs, device=device).to(dtype)

    def three() -> None:
        F.linear(x, w)
        torch.mm(dy, w)
        torch.mm(dy.t(), x)

    return 6 * tokens * inputs * outputs / _best(three, device)


def _attention_rates(device: torch.device, dtype: torch.dtype, graph: OpGraph) -> tuple[float, float]:
    """FLOP/s of attention over the full square under a mask that is written out, forward and backward."""
    op = next((op for op in graph.ops if op.kind == "attention"), None)
    if op is None:
        return 1.0, 1.0  # nothing will be divided by them
    kind = torch.float32 if device.type == "cpu" else dtype  # as attention is computed there
    heads, keys, width = op.heads, op.key_heads, op.head_dim
    batch = max(1, min(graph.batch, 2**24 // (graph.seq * heads * max(width, graph.seq // 8))))
    q, k, v = (
        torch.randn(batch, n, graph.seq, width, device=device, dtype=kind).requires_grad_() for n in (heads, keys, keys)
    )
    mask = torch.zeros(batch, 1, graph.seq, graph.seq, device=device, dtype=kind)

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != keys)

    work = 4 * batch * graph.seq**2 * heads * width
    mixed = forward()
    gradient = torch.ones_like(mixed)
    back = _best(lambda: torch.autograd.grad(mixed, (q, k, v), gradient, retain_graph=True), device)
    return work / _best(forward, device), BACKWARD * work / back


def _batched_rate(device: torch.device, dtype: torch.dtype, op: Op, graph: OpGraph, share: float) -> float:
    """FLOP/s of the products of a chunk of queries with the keys that it sees, and of their weights with the values."""
    heads, keys, width = op.heads, op.key_heads, op.head_dim
    rows, seen = heads // keys * query_chunk(graph.seq), max(1, int(share * graph.seq))
    pairs = max(1, min(graph.batch * keys, TOUCHED // (rows * max(seen, width))))
    q, k = (torch.randn(pairs, n, width, device=device).to(dtype) for n in (rows, seen))
    weights = torch.randn(pairs, rows, seen, device=device).to(dtype)

    def two() -> None:
        torch.bmm(q, k.mT)
        torch.bmm(weights, k)

    return 4 * pairs * rows * seen * width / _best(two, device)


def _sum_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second that a sum of two tensors reads and writes."""
    one, other = (torch.randn(TOUCHED, device=device).to(dtype) for _ in range(2))
    return 3 * TOUCHED * dtype.itemsize / _best(lambda: one + other, device)


def _softmax_time(device: torch.device) -> float:
    """Seconds an element of a softmax in fp32."""
    elements, row = WEIGHED
    scores = torch.randn(elements // row, row, device=device)
    return _best(lambda: scores.softmax(-1), device) / elements


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs after one to warm up."""
    times = []
    for _ in range(1 + ROUNDS):
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
