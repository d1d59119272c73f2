"""Reversible layers: gradients of the same computation stored, memory flat in depth, life among other layers, refusals."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from luban import build_model, describe
from luban.adapters.parallel import Parallel
from luban.adapters.prefix import PTuningV2
from luban.core.errors import ConfigError, UnsupportedError
from luban.core.plan import ParallelPlan
from luban.load.adapted import put_in
from luban.models.arrangement.reversible import Reversible
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.layer import LayerSpec
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.lsh import LSH
from luban.nn.mixer.routing import Routing
from luban.nn.moe.layer import MixtureOfExperts
from luban.nn.position.kerple import KerpleLog
from luban.parallel.mixers import check_mixers
from luban.planner.memory import StepSettings, saved_bytes

BASE = {"vocab_size": 41, "width": 24, "context": 64, "feedforward": SwiGLU(width=20), "init": NormalInit(std=0.3)}


def make(layers: int = 3, chunks: int = 1, mixer=None) -> ModelSpec:
    return uniform(**BASE, layers=layers, mixer=mixer or Grouped(heads=2), arrangement=Reversible(chunks=chunks))


def stored(model, tokens, **given):
    """The same layers with everything stored, written out."""
    stack, kept = model.decoder, []
    handle = stack.blocks.register_forward_pre_hook(lambda _, args: kept.append(args))
    model(tokens, output="hidden", **given)
    handle.remove()
    x, ctx, block_of = kept[0]
    x1 = x2 = x
    for index, name in block_of.items():
        block = stack.blocks[name]
        for part in ("mixer", "feedforward"):
            owner, beside = getattr(block, part), getattr(block, f"beside_{part}")
            read = getattr(block, f"{part}_norm")(x2 if part == "mixer" else x1)
            y = owner(read, ctx.layer(index)) + (beside(read) if beside else 0)
            x1, x2 = (x1 + y, x2) if part == "mixer" else (x1, x2 + y)
    return model.read(stack.norm((x1 + x2) / 2))


@pytest.mark.parametrize("mixer", [Grouped(heads=2), LSH(heads=2, buckets=4, span=8)])
@pytest.mark.parametrize("chunks", [1, 5])
def test_gradients_are_those_of_the_stored_computation(chunks, mixer):
    model = build_model(make(random.randint(2, 6), chunks, mixer), seed=random.randrange(1000))
    tokens = torch.randint(0, 41, (2, 33))
    documents = torch.sort(torch.randint(0, 3, (2, 33)), 1).values
    found = []
    for forward in (model, lambda *a, **k: stored(model, *a, **k)):
        torch.manual_seed(5)  # of the hashing's directions
        model.zero_grad()
        out = forward(tokens, documents=documents)
        out.square().mean().backward()
        found.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=0)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("beside", ["mixer", "feedforward"])
def test_adapters_beside_the_parts_have_the_gradients_of_the_stored_computation(beside):
    model, config = build_model(make(3, 2), seed=random.randrange(1000)), Parallel(width=4, beside=beside)
    put_in(model, config, config.initial(model.spec, dict(model.named_parameters()), 1), "test")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tokens, found = torch.randint(0, 41, (2, 17)), []
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    for forward in (model, lambda x: stored(model, x)):
        model.zero_grad()
        forward(tokens).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in trained.items()})
    assert len(found[0]) == 12
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-4)


def saved(spec: ModelSpec, tokens: int) -> int:
    """Bytes of floating-point activations that a forward keeps for its backward pass, hidden states alone."""
    model, found = build_model(spec), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.is_floating_point() and tensor.shape[0] != 1:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model(torch.randint(0, 41, (3, tokens)), output="hidden")
    del hidden
    return sum(storage.nbytes() for storage in found.values())


def test_what_is_kept_does_not_grow_with_depth_and_is_what_describe_says():
    two, nine = (saved(make(layers), 40) for layers in (2, 9))
    assert two == nine
    graph = describe(make(9), batch=3, seq=40)
    norm = 3 * 40 * (1 + 24)  # of the last norm: 1/deviation and the result before its gain
    last = 3 * 40 * 24  # the states that the head reads are kept by the loss
    assert nine == saved_bytes(graph, StepSettings()) + 4 * (norm - last)


def test_reversible_layers_stand_among_others_and_share_parameters():
    layer = LayerSpec(mixer=Grouped(heads=2), feedforward=SwiGLU(width=20))
    turned = replace(layer, arrangement=Reversible())
    fields = {name: value for name, value in BASE.items() if name != "feedforward"}
    spec = ModelSpec(**fields, layers=(layer, turned, replace(turned, share=1), layer, turned))
    model, tokens = build_model(spec, dtype="float64"), torch.randint(0, 41, (2, 20))
    model(tokens).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    stack = model.decoder

    def plainly(x, ctx, block_of):
        x1 = x2 = None
        for index, name in block_of.items():
            block = stack.blocks[name]
            if not block.reversible:
                x, x1 = block(x if x1 is None else (x1 + x2) / 2, ctx.layer(index)), None
                continue
            x1, x2 = (x, x) if x1 is None else (x1, x2)
            x1, x2 = block(x1, x2, x.dtype, ctx.layer(index))
        return x if x1 is None else (x1 + x2) / 2

    stack.blocks.forward = plainly
    model.zero_grad()
    model(tokens).square().mean().backward()
    for ours, theirs in zip(gradients, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


def test_half_precision_recomputes_what_it_computed():
    """Nearly always to the bit; where a sum is rounded otherwise, layers carry the difference on."""
    found = []
    for _ in range(9):
        model = build_model(make(8), dtype="bfloat16")
        tokens, kept = torch.randint(0, 41, (2, 30)), []
        block = model.decoder.blocks["0"]
        block.mixer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].detach()))
        model(tokens).float().square().mean().backward()
        first, second = (x.float() for x in kept)
        found.append(float((first - second).norm() / first.norm()))
    found.sort()  # bf16 has 8 bits
    assert found[4] < 2**-8 and found[7] < 2**-6 and found[8] < 2**-3, found


def test_centroids_of_routing_attention_move_once_a_step():
    spec = make(2, mixer=Routing(heads=2, local_heads=1, clusters=3, size=8, decay=0.5))
    model, tokens = build_model(spec), torch.randint(0, 41, (2, 30))
    model(tokens).sum().backward()
    counts = model.decoder.blocks["1"].mixer.routed.counts
    assert int(counts.sum()) == 60


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Reversible(chunks=0), "chunks must be at least 1, 0 given"),
        (
            lambda: uniform(layers=1, arrangement=Reversible(), feedforward=MixtureOfExperts()),
            "which a mixture of experts can't be",
        ),
        (
            lambda: uniform(layers=1, arrangement=Reversible(), position=KerpleLog()),
            "kerple_log positions would get no gradient",
        ),
        (
            lambda: uniform(layers=1, arrangement=Reversible(), body=EncoderDecoderBody()),
            "doesn't support cross-attention",
        ),
        (
            lambda: check_mixers(uniform(layers=1, arrangement=Reversible()), ParallelPlan(shard=2)),
            "arrangement reversible does not go with plan.shard: use --plan.replicate",
        ),
        (
            lambda: check_mixers(uniform(layers=1, arrangement=Reversible()), ParallelPlan(remat="full")),
            "keep nothing that plan.remat could recompute",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_trained_keys_before_every_text_are_refused():
    model = build_model(make())
    PTuningV2(length=2).adapt(model)
    with pytest.raises(UnsupportedError, match="use lora"):
        model(torch.randint(0, 41, (1, 5)))
