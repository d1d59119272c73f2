"""A frozen matmul with low-rank products inside it, against the same as single operations."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.adapters.dora import DoRA
from luban.adapters.lora import LoRA, LowRank
from luban.nn.linear import QKVLinear
from luban.nn.low_rank import adapted_linear, low_rank_linear, products

Added = list[tuple[int, tuple[Tensor, Tensor, float]]]


def drawn_case() -> tuple[Tensor, Tensor, Tensor, Added]:
    """float64 input, weight, bias and products of some of three projections."""
    rng, inputs, sizes = random.Random(), random.randrange(3, 9), [random.randrange(2, 8) for _ in range(3)]

    def made(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    added, start = [], 0
    for size in sizes:
        if rng.random() < 0.7 or (start and not added):
            rank = rng.randrange(1, 4)
            added.append((start, (made(rank, inputs), made(size, rank), 0.7)))
        start += size
    weight, bias = torch.randn(start, inputs, dtype=torch.float64), torch.randn(start, dtype=torch.float64)
    return made(2, 5, inputs), weight, bias, added


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, added: Added) -> Tensor:
    """Its definition."""
    y = F.linear(x, weight, bias)
    for start, (a, b, scale) in added:
        y = y + F.pad(x @ a.T @ b.T * scale, (start, len(weight) - start - len(b)))
    return y


def test_outputs_and_gradients_are_those_of_single_operations():
    for _ in range(5):
        x, weight, bias, added = drawn_case()
        leaves = [x, *(factor for _, (a, b, _) in added for factor in (a, b))]
        cotangent = torch.randn(2, 5, len(weight), dtype=torch.float64)
        for given in (bias, None):
            found, right = adapted_linear(x, weight, given, added), plain(x, weight, given, added)
            torch.testing.assert_close(found, right)
            for ours, theirs in zip(
                torch.autograd.grad(found, leaves, cotangent),
                torch.autograd.grad(right, leaves, cotangent),
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs)


def test_the_operator_tells_compilers_the_truth():
    x, weight, bias, added = drawn_case()
    a = torch.cat([a for _, (a, _, _) in added]).detach().requires_grad_()
    b, starts = [b.detach().requires_grad_() for _, (_, b, _) in added], [start for start, _ in added]
    torch.library.opcheck(low_rank_linear, (x.flatten(0, 1).detach().requires_grad_(), weight, bias, a, b, starts, 0.7))


def test_only_plain_products_of_one_scale_are_taken():
    sizes = {"q": 8, "k": 4, "v": 4}

    def lora(outputs, **fields):
        return LowRank(6, outputs, LoRA(rank=2, **fields))

    both = products(nn.ModuleDict({"q": lora(8), "v": lora(4)}), sizes)
    assert both is not None and [start for start, _ in both] == [0, 12]
    assert products(None, sizes) is None and products(nn.ModuleDict(), sizes) is None
    assert products(nn.ModuleDict({"q": lora(8), "v": lora(4, alpha=3.0)}), sizes) is None
    dropping = nn.ModuleDict({"q": lora(8, dropout=0.5)})
    assert products(dropping, sizes) is None and products(dropping.eval(), sizes) is not None
    from luban.adapters.dora import Directional

    assert products(nn.ModuleDict({"q": Directional(6, 8, DoRA(rank=2))}), sizes) is None


def test_a_trained_weight_gets_its_gradient():
    """Where the weight is trained beside the adapter, nothing is frozen and single operations run."""
    torch.manual_seed(0)
    owner, x = QKVLinear(6, queries=8, keys=4, bias=False), torch.randn(3, 6)
    for parameter in owner.parameters():
        nn.init.normal_(parameter)
    owner.add_adapter("q", LowRank(6, 8, LoRA(rank=2)))
    for parameter in owner.parameters():
        nn.init.normal_(parameter)
    sum(y.square().sum() for y in owner(x)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in owner.parameters())
