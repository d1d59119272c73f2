"""Low-rank adapters inside the owners of matmul weights: the same as adding the product to the weight, on every path.

The fused path runs under Triton's interpreter, in a separate process.
"""

from __future__ import annotations

import copy
import random

import pytest
import torch
from counted import Kernels
from interpreter import DEVICE, HERE, here, run_interpreted
from torch import nn
from torch.func import functional_call

from luban.core.errors import ConfigError
from luban.models.build import build_model
from luban.models.spec import uniform
from luban.nn import linear
from luban.nn.character import Highway
from luban.nn.embedding import Embedding
from luban.nn.feedforward.gated import GEGLU, SwiGLU
from luban.nn.feedforward.plain import GELU
from luban.nn.int8 import MOST_ROWS, pack_for_inference
from luban.nn.linear import JointLinear, Linear, QKVLinear, matmul_owners
from luban.nn.lm_head import LMHead, Vocabulary
from luban.nn.mixer.base import LayerShape
from luban.nn.mixer.grouped import Grouped
from luban.objectives.causal import Causal

WIDTH, VOCAB, ROWS = 16, 37, 5
SHAPE = LayerShape(WIDTH, 0, 1, True)
TARGETS = torch.tensor([3, -100, 36, 0, 7])


class LowRank(nn.Module):
    """x·Aᵀ·Bᵀ."""

    def __init__(self, inputs: int, outputs: int, rank: int = 3):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(rank, inputs)), nn.Parameter(torch.empty(outputs, rank))

    def forward(self, x):
        return x @ self.a.t() @ self.b.t()


MODULES = {
    "linear": (lambda: Linear(WIDTH, 12), lambda m, x: m(x)),
    "highway": (lambda: Highway(WIDTH), lambda m, x: m(x)),
    "qkv": (lambda: QKVLinear(WIDTH, queries=16, keys=8, bias=True), lambda m, x: torch.cat(m(x), -1)),
    "qkv side by side": (lambda: QKVLinear(WIDTH, queries=16, keys=8, bias=False), lambda m, x: m(x, joint=True)),
    "kv of an encoder": (lambda: JointLinear(WIDTH, {"k": 8, "v": 8}, bias=True), lambda m, x: torch.cat(m(x), -1)),
    "swiglu": (lambda: SwiGLU(width=24).build(SHAPE), lambda m, x: m(x)),
    "swiglu with biases": (lambda: SwiGLU(width=24, bias=True).build(SHAPE), lambda m, x: m(x)),
    "geglu": (lambda: GEGLU(width=24).build(SHAPE), lambda m, x: m(x)),
    "plain": (lambda: GELU(width=24, bias=True).build(SHAPE), lambda m, x: m(x)),
    "logits": (lambda: LMHead(WIDTH, VOCAB, bias=True, scale=0.5), lambda m, x: m(x)),
    "tied logits": (lambda: LMHead(WIDTH, VOCAB, bias=False, tied=Embedding(VOCAB, WIDTH)), lambda m, x: m(x)),
    "summed loss": (lambda: LMHead(WIDTH, VOCAB, bias=True), lambda m, x: m(x, TARGETS.to(x.device), z_loss=0.01)),
    "log-probabilities": (
        lambda: LMHead(WIDTH, VOCAB, bias=False),
        lambda m, x: m(x, TARGETS.to(x.device), reduce="none")[0],
    ),
}


@pytest.mark.skipif(HERE, reason="runs directly")
def test_under_the_interpreter():
    pytest.importorskip("triton", reason="triton is Linux-only")
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def fresh_numbers():
    torch.manual_seed(random.SystemRandom().randrange(2**31))


def without_kernels(monkeypatch):
    monkeypatch.setattr(linear, "trains_fused", lambda x: False)
    monkeypatch.setattr(Vocabulary, "linear_cross_entropy", lambda *_: None)


def add_adapters(module: nn.Module, chosen) -> dict[str, LowRank]:
    """An adapter for every projection for which `chosen(owner's name, projection)` is true, by the name of its weight."""
    made = {}
    for name, owner in list(matmul_owners(module)):
        for own, projection in owner.projections().items():
            if chosen(name, own):
                adapter = LowRank(projection.in_features, projection.out_features)
                owner.add_adapter(own, adapter)
                made[".".join(part for part in (name, own.removesuffix("weight"), "weight") if part)] = adapter
    return made


def combinations(module: nn.Module) -> list:
    """Each projection alone, and all together."""
    every = [(name, own) for name, owner in matmul_owners(module) for own in owner.projections()]
    alone = [lambda *place, one=one: place == one for one in every]
    return [*alone, lambda *_: True]


def by_merged_weights(module: nn.Module, adapters: dict[str, LowRank], call, x):
    """Output and gradients with W + B·A in the place of W, in float64 and by plain PyTorch."""
    plain, x = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
    for _, owner in matmul_owners(plain):
        owner.adapters = None
    leaves = {
        name: p.detach().double().requires_grad_()
        for name, p in module.named_parameters()
        if ".adapters." not in f".{name}"
    }
    pairs = {
        name: [p.detach().double().requires_grad_() for p in (adapter.a, adapter.b)]
        for name, adapter in adapters.items()
    }
    merged = leaves | {name: leaves[name] + b @ a for name, (a, b) in pairs.items()}
    out = functional_call(_Called(plain, call), {f"module.{name}": p for name, p in merged.items()}, (x,))
    return out, [x, *leaves.values(), *(p for pair in pairs.values() for p in pair)]


class _Called(nn.Module):
    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


def agree(module, adapters, call, dtype, tolerance, monkeypatch):
    x = torch.randn(ROWS, WIDTH, device=DEVICE, dtype=dtype, requires_grad=True)
    out = call(module, x)
    ours = [
        x,
        *(p for name, p in module.named_parameters() if ".adapters." not in f".{name}"),
        *(p for adapter in adapters.values() for p in (adapter.a, adapter.b)),
    ]
    with monkeypatch.context() as patch:
        without_kernels(patch)
        right, theirs = by_merged_weights(module, adapters, call, x)
    weight = torch.randn_like(right)
    torch.testing.assert_close(out.double(), right, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad((out * weight.to(out.dtype)).sum(), ours)
    for got, want in zip(found, torch.autograd.grad((right * weight).sum(), theirs), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", MODULES)
def test_an_adapter_is_the_same_as_a_sum_of_weights(name, monkeypatch):
    build, call = MODULES[name]
    dtype, tolerance = (torch.float32, 1e-4) if HERE else (torch.float64, 1e-11)
    for chosen in combinations(build()):
        module = build()
        adapters = add_adapters(module, chosen)
        module.to(DEVICE, dtype)
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        assert adapters
        agree(module, adapters, call, dtype, tolerance, monkeypatch)


def test_an_unknown_projection_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="QKVLinear has no projection 'o'; it has q, k, v"):
        QKVLinear(WIDTH, queries=16, keys=8, bias=False).add_adapter("o", LowRank(WIDTH, 16))


def decoder_and_batch(chosen):
    spec = uniform(
        vocab_size=VOCAB, width=WIDTH, layers=1, mixer=Grouped(heads=2, kv_heads=1), feedforward=SwiGLU(width=24)
    )
    model = build_model(spec, seed=random.randrange(1000))
    add_adapters(model, chosen)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(0, VOCAB, (1, 8), device=DEVICE)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": torch.rand(1, 7, device=DEVICE) < 0.8,
        "documents": None,
        "positions": None,
    }
    return model.to(DEVICE), batch


WHERE = {
    "nothing": lambda name, own: False,
    "queries and values": lambda name, own: own in ("q", "v"),
    "gates": lambda name, own: own == "gate",
    "downs": lambda name, own: own == "down",
    "outputs": lambda name, own: name.endswith("output"),
    "head": lambda name, own: name == "head",
    "everything": lambda name, own: True,
}
KERNELS = {
    "apply_rotary_qkv": 1,
    "apply_rotary_qkv_backward": 1,
    "swiglu": 1,
    "swiglu_backward": 1,
    "linear_cross_entropy": 1,
    "times": 3,
}


@here
@pytest.mark.parametrize("where", WHERE)
def test_fused_kernels_run_with_adapters(where, monkeypatch):
    """Loss and gradients of a decoder are those without kernels, and every kernel runs that runs without adapters; only the
    loss of a head with an adapter is computed by chunks of logits."""
    model, batch = decoder_and_batch(WHERE[where])
    found = []
    for fused in (True, False):
        model.zero_grad()
        if not fused:
            without_kernels(monkeypatch)
        with Kernels() as kernels:
            loss = Causal().loss(model)(batch).sum
            loss.backward()
        by_head = where in ("head", "everything")
        wanted = {name: n for name, n in KERNELS.items() if not (by_head and name in ("linear_cross_entropy", "times"))}
        assert dict(kernels.calls) == (wanted if fused else {})
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=1e-5)


@here
@pytest.mark.parametrize("projection", [None, "gate", "up", "down"])
def test_swiglu_is_not_fused_into_the_matmuls_of_an_adapted_network(projection, monkeypatch):
    """The fused matmul never writes the outputs to which an adapter's are added: SwiGLU then runs in its own kernel."""
    from luban.kernels import gated as paired_matmuls
    from luban.kernels.reference.swiglu import swiglu_of_pairs

    called = []

    def by_pairs(x, weight, down):
        called.append(weight)
        sums = x @ weight.t()
        return swiglu_of_pairs(sums) @ down.t(), sums

    monkeypatch.setattr(paired_matmuls, "gated_matmuls", by_pairs)
    monkeypatch.setattr(paired_matmuls, "serves", lambda *_: True)
    module = SwiGLU(width=24).build(SHAPE).to(DEVICE)
    adapters = add_adapters(module, lambda name, own: own == projection)
    for parameter in module.to(DEVICE).parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with Kernels() as kernels:
        agree(module, adapters, lambda m, x: m(x), torch.float32, 1e-4, monkeypatch)
    assert bool(called) == (projection is None)
    assert kernels.calls["swiglu"] == (0 if projection is None else 1)


@pytest.mark.parametrize("name", [name for name in MODULES if "loss" not in name and "prob" not in name])
@pytest.mark.parametrize("packed_first", [False, True])
def test_adapters_are_added_to_int8_weights_too(name, packed_first):
    """Weights that 8 bits hold exactly, so that packing changes nothing."""
    make, run = MODULES[name]
    modules = [make(), make()]
    for owner in (owner for _, owner in matmul_owners(modules[0])):
        for projection in owner.projections().values():
            with torch.no_grad():
                weight = torch.randint(-127, 128, projection.weight.shape)
                weight[:, 0] = 127
                projection.weight.copy_(weight * 2.0**-11)
                if projection.bias is not None:
                    projection.bias.normal_()
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(MOST_ROWS + 1, WIDTH)  # fewer are rounded to bfloat16
    before = run(modules[0], x)
    if packed_first:
        pack_for_inference(modules[1])
        torch.testing.assert_close(run(modules[1], x), before, rtol=1e-5, atol=1e-5)
    for (_, plain), (_, eight) in zip(matmul_owners(modules[0]), matmul_owners(modules[1]), strict=True):
        for projection, linear_map in plain.projections().items():
            adapter = LowRank(linear_map.in_features, linear_map.out_features)
            torch.nn.init.normal_(adapter.a)
            torch.nn.init.normal_(adapter.b)
            plain.add_adapter(projection, adapter)
            eight.add_adapter(projection, copy.deepcopy(adapter))
    if not packed_first:
        pack_for_inference(modules[1])
    after = run(modules[0], x)
    assert not torch.allclose(after, before, atol=0.1)
    torch.testing.assert_close(run(modules[1], x), after, rtol=1e-4, atol=1e-4)
