"""Times of single operations of a model's forward on the machine at hand, each on tensors of its own shapes.

B batch, T tokens, H heads, D head dim, E model width, I inner width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from luban.core.opgraph import Op, OpGraph
from luban.kernels.attention_mask import AttentionMask
from luban.models.base import Model
from luban.nn.attention.attend import attention
from luban.nn.attention.prepared_mask import prepare
from luban.planner.roofline import Fusion, Roof
from luban.train.device_rates import best_seconds

LARGEST = 2**28  # elements of one tensor that is made for a measurement


class OpTimer:
    """Measures operations of a graph.

    Args:
        graph: of one forward.
        model: the model that it describes, on `device`, for operations that only its modules can run.
    """

    def __init__(self, graph: OpGraph, model: Model | None, device: torch.device):
        self.graph, self.model, self.device = graph, model, device
        self.dtype: torch.dtype = getattr(torch, graph.dtype)
        self._modules: dict[str, float] | None = None

    @torch.inference_mode()
    def __call__(self, op: Op) -> float | None:
        """Seconds; None for an operation that neither runs by itself nor is a module."""
        made = self._closure(op)
        if made is not None:
            return best_seconds(made, self.device)
        return self._of_modules().get(op.name)

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype or self.dtype)

    def _closure(self, op: Op) -> Callable[[], object] | None:
        inputs = [self.graph.value(name) for name in op.inputs]
        sizes = [value.elements for value in inputs] + [op.output.elements, op.in_features * op.out_features]
        if max(sizes) > LARGEST or not inputs:
            return None
        if op.kind in ("linear", "lm_head") and op.role not in ("expert", "router"):
            x = self._random(inputs[0].elements // op.in_features, op.in_features)
            weight = self._random(op.out_features, op.in_features)
            return lambda: F.linear(x, weight)
        if op.kind == "attention":
            return self._attention(op)
        tensors = [
            torch.zeros(value.shape, dtype=torch.long, device=self.device)
            if value.dtype == "int64"
            else self._random(*value.shape)
            for value in inputs
        ]
        if op.kind == "norm":
            x = tensors[0].view(op.shape)
            weight = self._random(op.shape[-1])
            return lambda: F.rms_norm(x, (op.shape[-1],), weight)
        if op.kind == "activation":
            return (lambda: F.silu(tensors[0]) * tensors[1]) if len(tensors) == 2 else (lambda: F.gelu(tensors[0]))
        if op.kind == "add":
            return (lambda: tensors[0] + tensors[1]) if len(tensors) == 2 else (lambda: sum(tensors))
        if op.kind == "embedding" and inputs[0].dtype == "int64":
            rows = max(op.parameters // op.shape[-1], 1)
            weight = self._random(rows, op.shape[-1])
            ids = torch.randint(rows, inputs[0].shape, device=self.device)
            return lambda: F.embedding(ids, weight)
        return None

    def _attention(self, op: Op) -> Callable[[], object]:
        """By the kernel that a forward would use for a causal or an unmasked square."""
        (batch, heads, queries, width), keys = op.shape, self.graph.value(op.inputs[1]).shape[1]
        q = self._random(batch, heads, queries, width)
        k, v = (self._random(batch, op.key_heads, keys, width) for _ in range(2))
        mask = AttentionMask(queries=queries, keys=keys, causal=op.mask_density < 1, device=self.device)
        prepared = prepare(mask, head_dim=width, dtype=self.dtype)
        return lambda: attention(q, k, v, prepared)

    def _of_modules(self) -> dict[str, float]:
        """Seconds of the model's modules in a forward, the best of a few, by their names in the graph."""
        if self._modules is None:
            self._modules = {} if self.model is None else module_seconds(self.model, self.graph, self.device)
        return self._modules


def module_seconds(model: Model, graph: OpGraph, device: torch.device, rounds: int = 3) -> dict[str, float]:
    """Seconds of every module that an operation of the graph is named after."""
    wanted = {op.name for op in graph.ops}
    found: dict[str, float] = {}
    began: dict[str, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: began.__setitem__(name, now())

    def leave(name: str) -> Callable[..., None]:
        return lambda *_: found.__setitem__(name, min(found.get(name, 1e9), now() - began[name]))

    handles = []
    for name, module in model.named_modules():
        if name in wanted:
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave(name))]
    tokens = {value.name: torch.zeros(value.shape, dtype=torch.long, device=device) for value in graph.inputs}
    with torch.inference_mode():
        for _ in range(rounds):
            model(**tokens, output="hidden")
    for handle in handles:
        handle.remove()
    return found


@torch.inference_mode()
def measured_fusions(
    planned: list[Fusion],
    *,
    rows: int,
    seq: int,
    width: int,
    inner: int,
    heads: int,
    head_dim: int,
    vocab: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Fusion]:
    """The fusions of `luban.planner.roofline.fusions` with times: as separate operations, and as the model computes them."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    q, k, v = (random(rows, heads, seq, head_dim) for _ in range(3))
    gate, up = (random(rows * seq, inner) for _ in range(2))
    x, weight, head = random(rows * seq, width), random(width), random(vocab, width)
    targets = torch.randint(vocab, (rows * seq,), device=device)
    prepared = prepare(
        AttentionMask(queries=seq, keys=seq, causal=False, device=device), head_dim=head_dim, dtype=dtype
    )

    def separate_norm() -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    def fused_loss() -> object:
        from luban.nn.lm_head import WHOLE

        loss = WHOLE.linear_cross_entropy(x, head, None, targets, 0.0, 0.0)
        if loss is not None:
            return loss
        size = max(1, 2**22 // vocab)  # a chunk of logits that stays in the caches
        pieces = zip(x.split(size), targets.split(size), strict=True)
        return sum(F.cross_entropy(F.linear(piece, head).float(), wanted, reduction="sum") for piece, wanted in pieces)

    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "attention": (
            lambda: (q @ k.mT * head_dim**-0.5).softmax(-1) @ v,
            lambda: attention(q, k, v, prepared),
        ),
        "SwiGLU": (lambda: gate * torch.sigmoid(gate) * up, lambda: F.silu(gate) * up),
        "norm": (separate_norm, lambda: F.rms_norm(x, (width,), weight, 1e-5)),
        "loss": (lambda: F.cross_entropy(F.linear(x, head).float(), targets, reduction="sum"), fused_loss),
    }
    return [
        replace(each, separate_seconds=best_seconds(one, device), fused_seconds=best_seconds(other, device))
        for each in planned
        for one, other in (pairs[each.name],)
    ]


def measured_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """What one large matmul and a sum reach on this device."""
    from luban.train.device_rates import sum_rate

    size = 4096 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Roof(flops=2 * size**3 / best_seconds(lambda: a @ b, device), bandwidth=sum_rate(device, dtype))
