"""Rates of the training device: from accelerators.toml if it is listed there, otherwise measured."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from luban.core.opgraph import Op, OpGraph
from luban.kernels.dispatch import Case, pick
from luban.kernels.limits import query_chunk
from luban.models.spec import ModelSpec
from luban.nn.mixer.base import AttentionShape
from luban.parallel.device import keep_freed_memory, timed
from luban.parallel.precision import COMPUTE
from luban.planner.accelerators import Machine, accelerator_of
from luban.planner.memory import StepSettings, computed_fraction, is_chunked
from luban.planner.step_time import BACKWARD, Rates
from luban.planner.table_rates import table_rates

ROUNDS = 5  # of every measurement; the best counts
SUM_ELEMENTS = 2**22  # of the timed sum
SOFTMAX_ELEMENTS = 2**20, 256  # of the timed softmax, and of a row of it
# cost of one exp in a compiled element-wise loop, as a multiple of softmax's cost per element (casts, masking and
# reductions included)
EXP_COST = 5.0
BUSY = 0.8  # fraction of its threads' time below which a measurement had to share the machine
MATMUL_FLOPS = 2 * 10**10  # of the timed matmuls, at most


def machine_of(device: torch.device) -> Machine:
    """The machine that `device` belongs to."""
    if device.type != "cuda":
        return Machine(name=f"{device.type}, {torch.get_num_threads()} threads", accelerator=None)
    name = torch.cuda.get_device_name(device)
    return Machine(name=name, accelerator=accelerator_of(name))


def device_rates(
    machine: Machine,
    device: torch.device,
    precision: str,
    spec: ModelSpec,
    graph: OpGraph,
    settings: StepSettings,
    documents: bool = True,
    kernel: str | None = None,
) -> Rates:
    """Rates of the device with this model.

    Args:
        graph: one micro-batch.
        documents: rows hold several documents, which only some attention kernels can keep apart.
        kernel: of attention, asked for by name.
    """
    chosen = attention_kernel(device, precision, spec, documents, kernel)
    if machine.accelerator is None:
        return measured_rates(device, graph, settings)
    return table_rates(machine.accelerator, precision, chosen, first_attention(spec).head_dim)


def first_attention(spec: ModelSpec) -> AttentionShape:
    """Heads and mask of the first layer that attends; one head of the model's width where none does."""
    shapes = (layer.mixer.attention(spec.width) for layer in (*spec.layers, *spec.encoder))
    return next((shape for shape in shapes if shape is not None), AttentionShape(1, 1, spec.width))


def attention_kernel(
    device: torch.device, precision: str, spec: ModelSpec, documents: bool, kernel: str | None = None
) -> str:
    """The kernel that training will use, ignoring biases of the position method and taking documents to be few enough
    for a list of them.

    Raises:
        UnsupportedError: a kernel was asked for by name that can't serve.
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


def measured_rates(device: torch.device, graph: OpGraph, settings: StepSettings) -> Rates:
    """The same by running the model's largest matmul, one attention, a sum and a softmax."""
    keep_freed_memory(device)  # as in training; else page faults are timed
    dtype: torch.dtype = getattr(torch, graph.dtype)
    chunked = next((op for op in graph.ops if op.kind == "attention" and is_chunked(op, graph, settings)), None)
    if chunked is None:
        forward, backward = _attention_rates(device, dtype, graph)
    else:
        forward = _chunk_rate(device, dtype, chunked, graph)
        backward = forward * BACKWARD / 2  # four matmuls: nothing is computed again
    exponentials = 1 / (EXP_COST * _softmax_time(device)) if device.type == "cpu" else None
    return Rates(
        matmul=_matmul_rate(device, dtype, graph),
        attention_forward=forward,
        attention_backward=backward,
        bandwidth=sum_rate(device, dtype),
        full_square=True,
        exponentials=exponentials,
    )


def busy_fraction(device: torch.device) -> float | None:
    """Fraction of its threads' time that a matmul got, where that says that the machine does other work as well."""
    if device.type != "cpu":
        return None
    x = torch.randn(1024, 1024)
    torch.mm(x, x)
    began, used = time.perf_counter(), time.process_time()
    for _ in range(ROUNDS):
        torch.mm(x, x)
    share = (time.process_time() - used) / (time.perf_counter() - began) / torch.get_num_threads()
    return share if share < BUSY else None


def _matmul_rate(device: torch.device, dtype: torch.dtype, graph: OpGraph) -> float:
    """FLOP/s of the layers' largest matmul, of the head's where there is none, with the two of its gradients."""
    matmuls = [op for op in graph.ops if op.in_features]
    inside = [op for op in matmuls if op.kind == "linear"]
    largest = max(inside or matmuls, key=lambda op: op.flops, default=None)
    inputs, outputs = (graph.ops[0].shape[-1],) * 2 if largest is None else (largest.in_features, largest.out_features)
    tokens = min(graph.batch * graph.seq, max(256, MATMUL_FLOPS // (6 * inputs * outputs)))
    x, w = torch.randn(tokens, inputs, device=device).to(dtype), torch.randn(outputs, inputs, device=device).to(dtype)
    dy = torch.randn(tokens, outputs, device=device).to(dtype)

    def three() -> None:
        F.linear(x, w)
        torch.mm(dy, w)
        torch.mm(dy.t(), x)

    return 6 * tokens * inputs * outputs / best_seconds(three, device)


def _attention_rates(device: torch.device, dtype: torch.dtype, graph: OpGraph) -> tuple[float, float]:
    """FLOP/s of attention over the full square with a dense mask, forward and backward."""
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
    back = best_seconds(lambda: torch.autograd.grad(mixed, (q, k, v), gradient, retain_graph=True), device)
    return work / best_seconds(forward, device), BACKWARD * work / back


def _chunk_rate(device: torch.device, dtype: torch.dtype, op: Op, graph: OpGraph) -> float:
    """FLOP/s of the matmuls of a chunk of queries with the keys that it sees, and of the weights with the values."""
    heads, keys, width = op.heads, op.key_heads, op.head_dim
    rows, seen = heads // keys * query_chunk(graph.seq), max(1, int(computed_fraction(op) * graph.seq))
    pairs = max(1, min(graph.batch * keys, SUM_ELEMENTS // (rows * max(seen, width))))
    q, k = (torch.randn(pairs, n, width, device=device).to(dtype) for n in (rows, seen))
    weights = torch.randn(pairs, rows, seen, device=device).to(dtype)

    def two() -> None:
        torch.bmm(q, k.mT)
        torch.bmm(weights, k)

    return 4 * pairs * rows * seen * width / best_seconds(two, device)


def sum_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes a second that a sum of two tensors reads and writes."""
    one, other = (torch.randn(SUM_ELEMENTS, device=device).to(dtype) for _ in range(2))
    return 3 * SUM_ELEMENTS * dtype.itemsize / best_seconds(lambda: one + other, device)


def _softmax_time(device: torch.device) -> float:
    """Seconds an element of a softmax in fp32."""
    elements, row = SOFTMAX_ELEMENTS
    scores = torch.randn(elements // row, row, device=device)
    return best_seconds(lambda: scores.softmax(-1), device) / elements


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few runs after one to warm up."""
    return min(timed(work, device, ROUNDS))
