"""LSH and routing attention: hashing, rounds, one cluster as dense attention, and centroids that follow their tokens."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from luban import build_model, describe
from luban.core.errors import ConfigError
from luban.models.spec import uniform
from luban.nn.context import LayerContext, RowTokens
from luban.nn.mixer.base import LayerShape
from luban.nn.mixer.lsh import LSH, LSHAttention
from luban.nn.mixer.routing import Routing, RoutingAttention

WIDTH, HEADS, D = 24, 3, 8


def context(numbers=None, real=None):
    return LayerContext(None, None, None, None, None, rows=RowTokens(None, real), numbers=numbers)  # type: ignore[arg-type]


def module_of(config, kind):
    module = kind(config, LayerShape(WIDTH, 0, 1, True, 64)).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module


def dense(x, q, k, v, output, scale):
    """Shared queries and keys, every earlier token, itself only for the first."""
    T = x.shape[1]
    scores = (q @ k.mT * scale).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(), float("-inf"))
    scores[..., 0, 0] = 0
    return output((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("members", ["nearest", "top"])
def test_one_cluster_of_all_tokens_is_dense_attention(members):
    T = random.randint(2, 30)
    config = Routing(heads=HEADS, local_heads=0, clusters=1, size=T, members=members)
    module, x = module_of(config, RoutingAttention), torch.randn(2, T, WIDTH, dtype=torch.float64)
    module.routed.centroids.normal_()
    q, v = (part.unflatten(-1, (HEADS, D)).transpose(1, 2) for part in module.eval().qkv(x))
    q = F.layer_norm(q, (D,))
    torch.testing.assert_close(module(x, context()), dense(x, q, q, v, module.output, D**-0.5), atol=1e-10, rtol=0)


def test_one_bucket_is_dense_attention():
    T = random.randint(2, 30)
    module = module_of(LSH(heads=HEADS, buckets=1, span=T), LSHAttention)
    x = torch.randn(2, T, WIDTH, dtype=torch.float64)
    q, v = (part.unflatten(-1, (HEADS, D)).transpose(1, 2) for part in module.qv(x))
    wanted = dense(x, q, F.normalize(q, dim=-1), v, module.output, 1.0)
    torch.testing.assert_close(module(x, context()), wanted, atol=1e-10, rtol=0)


def test_hashes_are_the_largest_of_both_signs_and_alike_vectors_meet_more_often():
    config = LSH(heads=HEADS, buckets=8, rounds=200)
    hashing = LSHAttention(config, LayerShape(WIDTH, 0, 1, True, 64)).attention
    numbers = torch.randn(config.random_numbers(WIDTH, training=True))
    x = torch.randn(1, HEADS, 3, D)
    x[:, :, 1] = x[:, :, 0] + 0.1 * torch.randn(1, HEADS, D)
    found = hashing.hashed(x, numbers)
    h, r, t = random.randrange(HEADS), random.randrange(200), random.randrange(3)
    along = x[0, h, t] @ numbers[h].unflatten(-1, (200, 4))[:, r]
    assert found[0, h, r, t] == torch.cat((along, -along)).argmax()
    together = (
        (found[:, :, :, 0] == found[:, :, :, 1]).float().mean(),
        (found[:, :, :, 0] == found[:, :, :, 2]).float().mean(),
    )
    assert together[0] > together[1] + 0.2


def test_directions_are_new_in_training_alone_and_rounds_may_differ():
    spec = uniform(
        vocab_size=31, width=WIDTH, layers=2, context=48, mixer=LSH(heads=HEADS, buckets=6, rounds=1, eval_rounds=4)
    )
    model, tokens = build_model(spec), torch.randint(0, 31, (1, 48))
    shapes = []
    for block in model.decoder.blocks.values():
        block.mixer.attention.register_forward_pre_hook(lambda _, args: shapes.append(args[2].numbers.shape[-1] // 3))
    first, second = model(tokens), model(tokens)
    assert not torch.equal(first, second) and shapes == [1] * 4
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens))
    assert shapes[4:] == [4] * 4


def test_centroids_follow_the_mean_of_their_tokens_and_find_clusters():
    config = Routing(heads=1, local_heads=0, head_dim=WIDTH, clusters=3, size=4, decay=0.7)
    module = module_of(config, RoutingAttention).train()
    with torch.no_grad():
        module.qkv.q.weight.copy_(torch.eye(WIDTH))
    heads = module.routed
    ways = F.normalize(torch.randn(3, WIDTH, dtype=torch.float64), dim=-1)
    heads.centroids.copy_(F.normalize(ways + 0.3 * F.normalize(torch.randn_like(ways), dim=-1), dim=-1)[None])
    heads.sums.zero_(), heads.counts.zero_()
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, 30:] = False
    x = ways[torch.randint(0, 2, (2, 40))] + 0.02 * torch.randn(2, 40, WIDTH, dtype=torch.float64)
    before = heads.centroids.clone()
    module(x, context(real=real))
    assert torch.equal(heads.centroids, before)  # they move before the next forward
    normed = F.layer_norm(x, (WIDTH,))[real]
    nearest = (normed @ before[0].T).argmax(-1)
    module.update_statistics()
    for c in range(3):
        mine = normed[nearest == c]
        moved = (
            F.normalize(0.7 * before[0, c] + 0.3 * F.normalize(mine.sum(0), dim=-1), dim=-1)
            if len(mine)
            else before[0, c]
        )
        torch.testing.assert_close(heads.centroids[0, c], moved, atol=1e-10, rtol=0)
    once = heads.centroids.clone()
    module.update_statistics()
    assert torch.equal(heads.centroids, once)  # a forward counts once


def test_evaluation_moves_no_centroid():
    spec = uniform(vocab_size=31, width=WIDTH, layers=1, context=48, mixer=Routing(heads=HEADS, local_heads=1))
    model, tokens = build_model(spec), torch.randint(0, 31, (1, 40))
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        model(tokens)
        model(tokens)
    assert all(torch.equal(kept[name], buffer) for name, buffer in model.named_buffers())


def test_cost_grows_with_the_power_of_one_and_a_half():
    def flops(n):
        root = int(n**0.5)
        mixer = Routing(heads=HEADS, local_heads=0, clusters=root, size=root, members="top")
        graph = describe(uniform(vocab_size=31, width=WIDTH, layers=1, context=n, mixer=mixer))
        return next(op.flops for op in graph.ops if op.kind == "mixing")

    assert flops(65536) / flops(16384) == pytest.approx(4**1.5, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LSH(buckets=7), "an even number or 1, 7 given"),
        (lambda: LSH(span=0), "lsh's span must be at least 1, 0 given"),
        (lambda: LSH(eval_rounds=0), "eval_rounds must be at least 1, 0 given"),
        (lambda: Routing(heads=4, local_heads=4), "from 0 to 3 local_heads of 4, 4 given"),
        (lambda: Routing(decay=2), "decay must be from 0 to 1, 2 given"),
        (lambda: uniform(width=30, mixer=LSH(heads=4)), "width 30 can't be split over 4 heads"),
        (lambda: uniform(width=30, mixer=Routing(heads=4, local_heads=2)), "width 30 can't be split over 4 heads"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
