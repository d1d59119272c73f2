"""Mixtures of experts against dense layers, arithmetic and loops written out here."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from luban import build_model, describe
from luban.core.errors import ConfigError
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.spec import uniform
from luban.nn.context import LayerContext, RouterTraining
from luban.nn.feedforward.base import FeedForward
from luban.nn.mixer.base import LayerShape
from luban.nn.mixer.grouped import Grouped
from luban.nn.moe.experts import grouped_matmul, grouped_matmul_reference, serves_grouped
from luban.nn.moe.gshard import GShard
from luban.nn.moe.layer import MixtureOfExperts, MoELayer
from luban.nn.moe.router import GOLDEN, Router
from luban.nn.moe.routing import Tally, attach_loss, balance_loss, counts_by_row, router_z_loss
from luban.nn.moe.switch import Switch
from luban.nn.moe.top_k import TopK

WIDTH, INNER = 16, 12
NETWORKS = ["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"]
ROUTERS = [TopK(active=2), TopK(active=1, normalise=False), TopK(active=3), GShard(), Switch()]


def built(router: Router, experts: int = 4, network: str = "swiglu", dtype: torch.dtype = torch.float64) -> MoELayer:
    layer = MixtureOfExperts(width=INNER, experts=experts, network=network, router=router).build(
        LayerShape(WIDTH, 1, 4, True)
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.to(dtype)


def context(training: RouterTraining | None) -> LayerContext:
    return LayerContext(None, None, None, None, None, training)


def one_expert(layer: MoELayer, number: int, x: torch.Tensor) -> torch.Tensor:
    """Expert `number` of every token, by its own weights."""
    experts = layer.experts
    up = F.linear(x, experts.up.weight[number])
    inner = experts.activation(up)
    if experts.gate is not None:
        inner = experts.activation(F.linear(x, experts.gate.weight[number])) * up
    return F.linear(inner, experts.down.weight[number])


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize("network", NETWORKS)
def test_one_expert_is_the_dense_layer(network):
    layer = built(TopK(active=1), experts=1, network=network)
    dense = FeedForward.registry[network](width=INNER).build(LayerShape(WIDTH, 0, 1, True)).double()
    with torch.no_grad():
        for name in ("gate", "up", "down"):
            if getattr(dense, name, None) is not None:
                getattr(dense, name).weight.copy_(getattr(layer.experts, name).weight[0])
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("router", ROUTERS)
def test_outside_of_training_every_token_reads_its_likeliest_experts(router):
    layer, x = built(router), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    probabilities = F.linear(x, layer.router.weight).softmax(-1)
    wanted = torch.zeros_like(x)
    for row in range(2):
        for token in range(7):
            chances, best = probabilities[row, token].sort(descending=True)
            chances = chances[: router.chosen]
            if router.chosen > 1:
                chances = chances / chances.sum()
            for chance, number in zip(chances, best, strict=False):
                wanted[row, token] += chance * one_expert(layer, int(number), x[row, token])
    torch.testing.assert_close(layer(x, context(None)), wanted)


def greedy(router: GShard | Switch, probabilities: torch.Tensor, noise: torch.Tensor, layer: int) -> dict:
    """Which choices a row's experts read: algorithm 1 of GShard, token by token; {(token, expert): weight}."""
    tokens, count = probabilities.shape
    capacity = math.ceil(router.chosen * router.capacity * tokens / count)
    order = probabilities.argsort(-1, descending=True)
    queue, taken = [0] * count, {}
    for choice in range(router.chosen):
        for token in range(tokens):
            expert = int(order[token, choice])
            pair = probabilities[token, order[token, : router.chosen]]
            weight = (pair[choice] / pair.sum()).item() if router.chosen > 1 else pair[0].item()
            if choice == 1 and not 2 * weight > (float(noise[token]) + layer * GOLDEN) % 1:
                continue
            if queue[expert] < capacity:
                taken[token, expert] = weight
            queue[expert] += 1
    return taken


@pytest.mark.parametrize(
    "router", [GShard(capacity=0.6), GShard(capacity=1.5), Switch(capacity=0.7), Switch(capacity=3.0)]
)
def test_capacity_and_the_random_second_expert_equal_a_loop_over_tokens(router):
    layer, x = built(router), torch.randn(3, 11, WIDTH, dtype=torch.float64)
    noise = torch.rand(3, 11, dtype=torch.float64)
    found = layer(x, context(RouterTraining(torch.full((3,), 1 / 3, dtype=torch.float64), None, noise)))
    probabilities = F.linear(x, layer.router.weight).softmax(-1)
    wanted, taken = torch.zeros_like(x), 0
    for row in range(3):
        for (token, expert), weight in greedy(router, probabilities[row], noise[row], layer.layer).items():
            wanted[row, token] += weight * one_expert(layer, expert, x[row, token])
            taken += 1
    torch.testing.assert_close(found, wanted)
    found.sum().backward()
    tally = layer.tally.take()
    assert tally is not None
    assert float(tally[4] - tally[5]) == taken  # asked less dropped


def test_padding_takes_no_place_and_is_not_counted():
    router = Switch(capacity=1.0, balance=1.0)
    layer, x = built(router), torch.randn(1, 8, WIDTH, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([[False] * 3 + [True] * 5])
    layer(x, context(RouterTraining(torch.ones(1), valid))).sum().backward()
    tally = layer.tally.take()
    assert tally is not None
    assert float(tally[:4].sum()) == 5
    alone = built(router)
    alone.load_state_dict(layer.state_dict())
    alone(x[:, 3:].detach().requires_grad_(), context(RouterTraining(torch.ones(1)))).sum().backward()
    other = alone.tally.take()
    assert other is not None
    torch.testing.assert_close(tally[6:], other[6:])


def test_the_balance_loss_of_a_uniform_router_is_one_and_of_a_collapsed_one_the_number_of_experts():
    probabilities = torch.full((2, 8, 4), 0.25)
    even = torch.arange(8).remainder(4).expand(2, 8)[..., None]
    counts = counts_by_row(even, 4, None, torch.float32)
    torch.testing.assert_close(balance_loss(probabilities, counts, None, identity), torch.ones(2))
    # GShard's l_aux is 1/X² of it
    gshard = (counts / 8 * probabilities.mean(1)).sum(1) / 4
    torch.testing.assert_close(gshard, torch.full((2,), 1 / 16))
    collapsed = torch.zeros(2, 8, 4)
    collapsed[..., 1] = 1
    counts = counts_by_row(collapsed.argmax(-1, keepdim=True), 4, None, torch.float32)
    torch.testing.assert_close(balance_loss(collapsed, counts, None, identity), torch.full((2,), 4.0))


def test_the_losses_gradients_are_those_of_their_formulas():
    logits = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    chosen = logits.softmax(-1).topk(2).indices
    weights = torch.rand(3, dtype=torch.float64)
    found = (
        weights * balance_loss(logits.softmax(-1), counts_by_row(chosen, 5, None, torch.float64), None, identity)
    ).sum()
    share = F.one_hot(chosen, 5).double().sum(2).mean(1) / 2
    wanted = sum(
        weights[row] * 5 * sum(share[row, e] * logits[row].softmax(-1)[:, e].mean() for e in range(5))
        for row in range(3)
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, wanted)))
    z = torch.stack([row.exp().sum(-1).log().square().mean() for row in logits])
    torch.testing.assert_close(router_z_loss(logits, None, identity), z)


def test_an_attached_loss_adds_its_gradient_once_however_often_it_is_recomputed():
    x, weight = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    tally = Tally(1)

    def run(x: torch.Tensor) -> torch.Tensor:
        return attach_loss(x, (x * weight).square().sum(), torch.ones(6), tally) * 2

    checkpoint(run, checkpoint(run, x, use_reentrant=False), use_reentrant=False).sum().backward()
    first = (2 * x).detach().requires_grad_()
    loss = (2 * first).sum() + (first * weight).square().sum()
    wanted = torch.autograd.grad(loss, (first, weight))
    inner = torch.autograd.grad((x * weight).square().sum(), (x, weight))
    torch.testing.assert_close(x.grad, 2 * wanted[0] + inner[0])
    torch.testing.assert_close(weight.grad, wanted[1] + inner[1])
    total = tally.take()
    assert total is not None
    assert float(total[0]) == 2
    assert tally.take() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [(0, 3, 0, 5), (4, 0, 0, 0), (0, 0, 0, 0)])
def test_grouped_matmuls_equal_one_matmul_an_expert(dtype, sizes):
    rows = torch.randn(sum(sizes), 16, dtype=dtype, requires_grad=True)
    weights = torch.randn(4, 8, 16, dtype=dtype, requires_grad=True)
    ends = torch.tensor(sizes).cumsum(0).to(torch.int32)
    assert serves_grouped(rows, weights) == (dtype != torch.float64)
    assert not serves_grouped(torch.randn(2, 15, dtype=dtype), torch.randn(4, 8, 15, dtype=dtype))
    found, wanted = (
        (y, *torch.autograd.grad(y.square().sum(), (rows, weights)))
        for y in (function(rows, weights, ends) for function in (grouped_matmul, grouped_matmul_reference))
    )
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other)


def test_routers_compute_in_float32_in_a_half_precision_model():
    layer = built(TopK(), dtype=torch.bfloat16)
    layer.router.float()
    x = torch.randn(1, 3, WIDTH, dtype=torch.bfloat16)
    logits = layer.router(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, F.linear(x.float(), layer.router.weight), rtol=0, atol=0)
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("router", ROUTERS)
def test_described_parameters_and_flops_are_those_of_a_forward(router, monkeypatch):
    monkeypatch.setattr(
        "luban.nn.moe.experts.serves_grouped", lambda rows, weights: False
    )  # torch counts none of these, nor fused attention
    moe = MixtureOfExperts(width=48, experts=4, router=router)
    spec = uniform(vocab_size=61, width=32, layers=2, context=40, mixer=Grouped(heads=4), feedforward=moe)
    model, graph = build_model(spec), describe(spec, batch=2, seq=9)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randint(0, 61, (2, 9)))
    assert graph.parameters == sum(p.numel() for p in model.parameters())
    assert sum(op.flops for op in graph.ops if op.kind != "attention") == counter.get_total_flops()
    experts = 2 * sum(p.numel() for p in model.decoder.blocks["0"].feedforward.experts.parameters())
    assert graph.active_parameters == graph.parameters - experts + experts * router.chosen // 4


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="gives a token 2 experts, and there are 1"):
        MixtureOfExperts(experts=1)
    with pytest.raises(ConfigError, match="no biases"):
        MixtureOfExperts(bias=True)
    with pytest.raises(ConfigError, match="capacity must be above 0"):
        GShard(capacity=0)
    with pytest.raises(ConfigError, match=r"router.balance is a factor from 0 on"):
        TopK(balance=-1)
    spec = uniform(vocab_size=9, width=32, layers=1, mixer=Grouped(heads=4), body=EncoderDecoderBody())
    moe = tuple(replace(layer, feedforward=MixtureOfExperts()) for layer in spec.layers)
    with pytest.raises(ConfigError, match="encoder–decoders don't support mixtures"):
        replace(spec, layers=moe)
