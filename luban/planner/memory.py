"""Predicts the memory of one training step from the operations of the model and the settings of the trainer.

Weights, gradients and optimizer state follow from the number of parameters. Activations follow from
`Op.saved_elements`, the elements that each operation saves for its backward pass. A pre-norm decoder layer over N tokens, with model width E,
queries of width Q, keys and values of width K and inner width I, saves in the dtype of the matmuls:

    residual                            N·E
    normed input of attention           N·E
    queries, keys, values               N·(Q + 2K)
    output of attention                 N·Q, and its log-sum-exp, one fp32 number a head and token
    residual after attention            N·E
    normed input of the feed-forward    N·E
    gate and up, gated activation       N·2I + N·I

Settings change this:

- Kernels on a GPU also save the concatenated weights of joint matmuls (q, k, v; gate, up), and don't save the gated
  activation if SwiGLU's backward pass recomputes it.
- Activation checkpointing "selective" saves only outputs of matmuls and attention, "full" only the input of each layer;
  "sqrt" and "rotor" save what their schedule of the layers keeps at its peak.
- bf16 and fp16 attention on a CPU runs in one of two ways: in fp32, saving fp32 copies of its inputs and output; or as
  bf16 matmuls over chunks of queries, saving its probabilities in fp32 (for softmax's gradient) and in bf16 (for the
  values' gradient), and the keys and values of each chunk.

This describes a compiled step. Memory of an uncompiled step is traced on tensors without data, outside of this package,
and passed in as `TracedMemory`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Literal

from luban.core.opgraph import Op, OpGraph
from luban.core.plan import SCHEDULES, Remat
from luban.core.units import bytes_
from luban.kernels.limits import CHUNK_ELEMENTS, LARGEST_SQUARE, LOGIT_BYTES, query_chunk
from luban.planner.offload import HostMemory
from luban.planner.remat.chain import Chain, Schedule
from luban.planner.remat.schedules import nearest_schedule, schedule_of

FP32, HALF = 4, 2  # bytes
COLUMNS = frozenset({"q", "k", "v", "gate", "up"})  # roles of matrices that the axis tensor divides by columns


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Trainer and device settings that memory and step time depend on."""

    master_weights: bool = True  # fp32 master weights are kept in addition to half-precision ones
    trained: int | None = None  # parameters with gradients and masters, those of adapters included; None: all
    accumulates: bool = False  # a step has several micro-batches; their gradients are summed in fp32
    remat: Remat = "none"
    remat_budget: str = "50%"  # of rotor
    remat_layer: Remat = "none"  # of layers that a schedule keeps
    gpu_kernels: bool = False  # GPU code paths: joint matmuls, logits and loss computed in chunks
    saves_activation: bool = True  # the output of feed-forward activations is saved; else it is recomputed
    activation_in_matmul: bool = False  # SwiGLU is fused with the matmuls or, in fp8, fused with quantisation
    # fused: one kernel in the dtype of the matmuls. fp32: the same on fp32 copies. chunked: matmuls over chunks of
    # queries if the scores are few enough to be saved, else as fp32.
    attention: Literal["fused", "fp32", "chunked"] = "fused"
    dense_masks: int = 0  # number of fp32 masks (T × T per row), if attention isn't fused
    optimizer_bytes: int = 0  # of the optimizer's state
    offloads: bool = (
        False  # fp32 weights and optimizer state aren't on the device, and gradients leave it layer by layer
    )
    host_parameters: int = 0  # with `offloads`: those whose half-precision weights stay on the host, too
    layers_here: int = 0  # with `offloads`: how many layers have their half-precision weights on the device (0: all)
    update_bytes: int = 0  # allocated by the optimizer during its update


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """Bytes at the peak of a step, by category."""

    parameters: int  # weights; with mixed precision half-precision weights and fp32 masters
    optimizer: int  # optimizer state
    gradients: int  # of parameters, those allocated at the peak
    activations: int  # saved by the forward pass of one micro-batch
    transient: int  # logits of a chunk, gradients of activations, the update's temporaries

    @property
    def total(self) -> int:
        """Sum of all categories."""
        return sum(getattr(self, field.name) for field in fields(self))

    def beside(self, host: HostMemory) -> MemoryPrediction:
        """With what offloading takes of the host's memory, where the device has no other."""
        return replace(
            self,
            parameters=self.parameters + host.weights,
            optimizer=self.optimizer + host.state,
            gradients=self.gradients + host.gradients,
        )

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {bytes_(getattr(self, field.name))}" for field in fields(self))
        return f"{bytes_(self.total)} ({parts})"


@dataclass(frozen=True, kw_only=True)
class TracedMemory:
    """Traced allocation of one micro-batch in bytes, excluding weights and optimizer state."""

    saved: int  # saved by the forward pass for the backward pass
    peak: int  # peak of all allocations, gradients included


def predict_memory(graph: OpGraph, settings: StepSettings, traced: TracedMemory | None = None) -> MemoryPrediction:
    """The memory of one training step at its peak.

    The peak is at one of four moments: the loss, with all activations saved and logits allocated; the backward pass of
    the last layer; the end of the backward pass, with all gradients allocated; the update. In between, activations
    shrink as gradients grow.

    Args:
        graph: the operations of one micro-batch.
        traced: memory of an uncompiled step; it replaces the first two moments.
    """
    itemsize = graph.itemsize
    n = graph.parameters if settings.trained is None else settings.trained
    masters = FP32 * n if settings.master_weights and itemsize < FP32 else 0
    sums = max(FP32, itemsize) * n if settings.accumulates else 0
    if settings.offloads:
        masters, sums, n_gradients = 0, 0, max((layer.parameters for layer in graph.layers().values()), default=n)
    else:
        n_gradients = n
    frozen = 0 if settings.trained is None else graph.parameters
    elsewhere = settings.host_parameters
    if settings.layers_here and not frozen:
        elsewhere = sum(sorted(layer.parameters for layer in graph.layers().values())[: -settings.layers_here])
    fixed = {
        "parameters": itemsize * (frozen + n - elsewhere) + masters,
        "optimizer": 0 if settings.offloads else settings.optimizer_bytes,
    }
    if traced is None:
        saved = saved_bytes(graph, settings)
        head_gradient = (
            0 if frozen else max((itemsize * _weights(op) for op in graph.ops if op.kind == "lm_head"), default=0)
        )
        in_backward = _recomputed_bytes(graph, settings) + _activation_gradient_bytes(graph)
        moments = [(0, saved, _loss_bytes(graph, settings)), (head_gradient, saved, in_backward)]
    else:
        moments = [(0, traced.saved, traced.peak - traced.saved)]
    candidates = (
        *(
            MemoryPrediction(**fixed, gradients=sums + gradients, activations=saved, transient=transient)
            for gradients, saved, transient in moments
        ),
        MemoryPrediction(**fixed, gradients=sums + itemsize * n_gradients, activations=0, transient=0),
        MemoryPrediction(
            **fixed,
            gradients=sums or itemsize * n_gradients,
            activations=0,
            transient=0 if settings.offloads else settings.update_bytes,
        ),
    )
    return max(candidates, key=lambda moment: moment.total)


def saved_bytes(graph: OpGraph, settings: StepSettings) -> int:
    """Bytes that the forward pass of one micro-batch saves for the backward pass, without logits."""
    outside = _saved(op for op in graph.ops if not op.layer and op.kind != "lm_head")
    if settings.remat in SCHEDULES:
        inside = sum(int(schedule.peak) for _, schedule in schedules(graph, settings))
    else:
        inside = sum(layer_saved_bytes(layer, settings) for layer in graph.layers().values())
    return graph.itemsize * outside + inside + _mask_bytes(graph, settings)


def schedules(
    graph: OpGraph, settings: StepSettings, of: Callable[[str, Chain, str], Schedule] = schedule_of
) -> list[tuple[Chain, Schedule]]:
    """The schedule of each stack's layers under `plan.remat sqrt|rotor`, in FLOPs and bytes. The program's own schedule is solved
    for measured costs."""
    stacks: dict[str, list[OpGraph]] = {}
    for name, layer in graph.layers().items():
        stacks.setdefault(name.rpartition(".")[0], []).append(layer)
    plain, found = replace(settings, remat=settings.remat_layer), []
    for layers in stacks.values():
        outputs = [layer.itemsize * layer.ops[-1].output.elements for layer in layers]
        chain = Chain(
            forward=[layer.forward_flops for layer in layers],
            backward=[2 * layer.forward_flops for layer in layers],
            output_size=outputs,
            saved_size=[max(layer_saved_bytes(layer, plain), out) for layer, out in zip(layers, outputs, strict=True)],
        )
        found.append((chain, of(settings.remat, chain, settings.remat_budget)))
    return found


def computed_again(graph: OpGraph, settings: StepSettings) -> float:
    """Forward passes of the layers in addition to the first, as a mean over their FLOPs."""
    if settings.remat not in SCHEDULES:
        return float(settings.remat == "full")
    extra = whole = 0.0
    for chain, schedule in schedules(graph, settings, nearest_schedule):
        whole += sum(chain.forward)
        extra += schedule.makespan - sum(chain.forward) - sum(chain.backward)
    return extra / max(whole, 1.0)


def layer_saved_bytes(layer: OpGraph, settings: StepSettings) -> int:
    """Bytes that one Transformer layer saves."""
    itemsize = layer.itemsize
    if settings.remat == "full":
        return itemsize * layer.ops[-1].output.elements  # the layer's output, which is the next layer's input
    selective = settings.remat == "selective"
    elements = _saved(op for op in layer.ops if not selective or op.kind in ("linear", "attention"))
    if not (selective or settings.saves_activation):
        elements -= _saved(op for op in layer.ops if op.kind == "activation")
    weights = itemsize * joint_parameters(layer) if settings.gpu_kernels and settings.remat == "none" else 0
    return itemsize * elements + weights + sum(_attention_bytes(op, layer, settings) for op in layer.ops)


def _attention_bytes(op: Op, layer: OpGraph, settings: StepSettings) -> int:
    """Bytes that attention saves in addition to its inputs and output in the matmuls' dtype."""
    if op.kind != "attention" or not op.saved_elements:  # a reversible layer saves nothing
        return 0
    q, k, v = (layer.value(name).elements for name in op.inputs[:3])
    if is_chunked(op, layer, settings):
        queries = op.shape[2]
        computed, chunks = computed_fraction(op), -(-queries // query_chunk(queries))
        scores = int(computed * score_count(op))
        if settings.remat == "selective":  # saves the outputs of matmuls, here the scores
            return HALF * scores
        copies = computed * chunks if is_treated_as_causal(op) else 1
        return (FP32 + HALF) * scores + int((copies - 1) * HALF * (k + v))
    log_sum_exp = FP32 * op.output.elements // op.head_dim
    if settings.attention == "fused" or layer.itemsize >= FP32:
        return log_sum_exp
    return log_sum_exp + (FP32 - HALF) * (q + k + v) + FP32 * op.saved_elements


def _mask_bytes(graph: OpGraph, settings: StepSettings) -> int:
    """Bytes of fp32 masks, shared by all layers; chunked attention rebuilds them in backward."""
    kept = settings.attention != "fused" and any(
        op.kind == "attention" and not is_chunked(op, graph, settings) for op in graph.ops
    )
    return FP32 * settings.dense_masks * graph.batch * graph.seq**2 if kept else 0


def is_chunked(op: Op, graph: OpGraph, settings: StepSettings) -> bool:
    """True if this attention is computed by matmuls over chunks of queries, saving its scores."""
    return settings.attention == "chunked" and graph.itemsize < FP32 and score_count(op) <= LARGEST_SQUARE


def score_count(op: Op) -> int:
    """Number of query–key pairs without a mask, over all heads and rows."""
    return op.flops // (4 * max(1, op.head_dim))


def is_treated_as_causal(op: Op) -> bool:
    """True if the op is treated as causal (density ≤ ½; also true for narrow two-sided windows)."""
    return op.mask_density <= 0.5


def computed_fraction(op: Op) -> float:
    """Fraction of queries × keys that chunked attention computes under its mask."""
    if not is_treated_as_causal(op):
        return 1.0
    seq = op.shape[2]
    chunk = query_chunk(seq)
    return sum(min(chunk, seq - at) * min(at + chunk, seq) for at in range(0, seq, chunk)) / seq**2


def joint_parameters(graph: OpGraph) -> int:
    """Number of weights that joint matmuls concatenate: queries, keys and values; gate and up."""
    return sum(op.parameters for op in graph.ops if op.fusion_group)


def gathered_elements(graph: OpGraph) -> int:
    """Elements of the inputs of matrices that the axis tensor divides by columns. It gathers them whole, and they are saved so where
    nothing is computed again."""
    inputs = {op.inputs[0] for op in graph.ops if op.layer and op.role in COLUMNS}
    return sum(graph.value(name).elements for name in inputs)


def _weights(op: Op) -> int:
    return op.in_features * op.out_features


def _saved(ops: Iterable[Op]) -> int:
    """Number of elements that these operations save."""
    return sum(op.saved_elements for op in ops)


def _largest_layer(graph: OpGraph) -> OpGraph | None:
    """The layer that saves the most elements."""
    return max(graph.layers().values(), key=lambda layer: _saved(layer.ops), default=None)


def _recomputed_bytes(graph: OpGraph, settings: StepSettings) -> int:
    """Bytes of the layer being recomputed, in addition to the saved activations."""
    layer = _largest_layer(graph)
    if layer is None or settings.remat == "none" or settings.remat in SCHEDULES:  # the schedule's peak counts it
        return 0
    if settings.remat == "full":
        return layer_saved_bytes(layer, replace(settings, remat="none", gpu_kernels=False))
    activations = _saved(op for op in layer.ops if op.kind == "activation") if settings.saves_activation else 0
    scores = [
        int(computed_fraction(op) * score_count(op))
        for op in layer.ops
        if op.kind == "attention" and is_chunked(op, layer, settings)
    ]
    return layer.itemsize * activations + (FP32 + HALF) * max(scores, default=0)


def _activation_gradient_bytes(graph: OpGraph) -> int:
    """Bytes by which the gradients of activations in the last layer exceed the activations freed before them.

    Allocated are the gradients of the layer's output and of everything inside its feed-forward network. The head's input
    and the final norm's input are already freed. 0 if more is freed than allocated.
    """
    layer = _largest_layer(graph)
    if layer is None:
        return 0
    inner = _saved(op for op in layer.ops if op.role in ("gate", "up") or op.kind == "activation")
    return layer.itemsize * max(0, inner - layer.ops[-1].output.elements)


def _loss_bytes(graph: OpGraph, settings: StepSettings) -> int:
    """Bytes of one chunk of logits (the gradient is written in place). On GPU also d(head input) and two fp32 buffers for
    the head's weight gradient."""
    head = next((op for op in graph.ops if op.kind == "lm_head"), None)
    if head is None:
        return 0
    logits = prod(head.shape)
    if not settings.gpu_kernels:
        return graph.itemsize * min(logits, CHUNK_ELEMENTS)
    inputs = graph.value(head.inputs[0]).elements
    return min(graph.itemsize * logits, LOGIT_BYTES) + 2 * FP32 * _weights(head) + graph.itemsize * inputs
