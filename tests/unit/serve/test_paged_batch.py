"""The paged cache against the contiguous one: the same tokens, whatever shares the batch, arrives, leaves or is preempted."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import luban
from luban import Sampling
from luban.core.errors import UnsupportedError
from luban.generate.paged_cache import PagedCache, paging_refusal
from luban.load.model import LoadedModel
from luban.models.arrangement.parallel import Parallel
from luban.models.arrangement.post import PostNorm
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.spec import ModelSpec, changed, uniform
from luban.nn.attention.packed import PackedTokens
from luban.nn.attention.paged import PagedAttention
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.feedforward.plain import GELU
from luban.nn.init import NormalInit
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.layout import GlobalRandom, Strided
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.alibi import Alibi
from luban.nn.position.falcon_alibi import FalconAlibi
from luban.nn.position.kerple import KerpleLog, KerplePower
from luban.nn.position.learned import Learned
from luban.nn.position.logn import LogN
from luban.nn.position.none import NoPosition
from luban.nn.position.randomised import Randomised
from luban.nn.position.rope import Rope
from luban.nn.position.scaling import Dynamic, YaRN
from luban.nn.position.t5 import RelativeBias
from luban.nn.position.two_dimensional import Rope2D
from luban.nn.position.xpos import XPos
from luban.serve.memory import slot_bytes
from luban.serve.paged import PagedBatch
from luban.serve.request import Request

CONTEXT = 90


def spec(**fields) -> ModelSpec:
    plain = {"mixer": Grouped(heads=4, kv_heads=2), "feedforward": SwiGLU(width=40), "layers": 2}
    return uniform(
        **{"vocab_size": 37, "width": 32, "context": CONTEXT, "init": NormalInit(std=0.2), **plain, **fields}
    )


def two_layers(**second) -> ModelSpec:
    """A second layer of another kind."""
    made = spec()
    return replace(made, layers=(made.layers[0], replace(made.layers[1], **second)))


def two_sided(*, second: int | None = None, **fields) -> ModelSpec:
    """An encoder–decoder."""
    return spec(body=EncoderDecoderBody(decoder_start=1, decoder_second=second), **fields)


VARIANTS = {
    "rope": spec(),
    "one key head, biases": spec(mixer=Grouped(heads=4, kv_heads=1, qkv_bias=True, score_scale=0.3)),
    "multi-head, norms of heads": spec(mixer=Grouped(heads=4, qk_norm=RMSNorm())),
    "window": spec(mixer=Grouped(heads=4, kv_heads=2, window=7)),
    "window of some layers": two_layers(
        mixer=Grouped(heads=2, kv_heads=1, head_dim=8, window=20), position=Rope(base=99.0)
    ),
    "layout": spec(mixer=Grouped(heads=4, kv_heads=2, layout=Strided(block=16, window=16, stride=2))),
    "layout by head": spec(mixer=Grouped(heads=4, kv_heads=2, layout=GlobalRandom(block=16, window=0, random=1))),
    "none": spec(position=NoPosition(), arrangement=Parallel()),
    "learned": spec(position=Learned(), norm=LayerNorm(), feedforward=GELU(width=40), arrangement=PostNorm()),
    "alibi": spec(position=Alibi()),
    "alibi and window": spec(position=Alibi(), mixer=Grouped(heads=4, window=9)),
    "kerple power": spec(position=KerplePower()),
    "kerple log": spec(position=KerpleLog(), mixer=Grouped(heads=3, kv_heads=1, head_dim=10)),
    "t5": spec(position=RelativeBias(), mixer=Grouped(heads=4, kv_heads=2, score_scale=1.0)),
    "alibi of a layer": two_layers(position=Alibi()),
    "logn": spec(position=LogN(trained=16)),
    "logn over t5": spec(position=LogN(inner=RelativeBias(), trained=16)),
    "xpos": spec(position=XPos()),
    "two-dimensional": spec(position=Rope2D()),
    "yarn": spec(position=Rope(scaling=YaRN(factor=4.0, original=24))),
    "randomised": spec(position=Randomised(longest=200)),
    "encoder–decoder": two_sided(position=RelativeBias(), mixer=Grouped(heads=4, score_scale=1.0)),
    "encoder–decoder, forced token": two_sided(position=Learned(), norm=LayerNorm(), second=7),
}
CONTIGUOUS = {
    "falcon": (spec(position=FalconAlibi()), "no function of the distance"),
    "randomised alibi": (spec(position=Randomised(inner=Alibi(), longest=200)), "no function of the distance"),
    "dynamic": (spec(position=LogN(inner=Rope(scaling=Dynamic(factor=2.0, original=20)))), "how long a sequence is"),
    "encoder–decoder": (two_sided(position=Rope(scaling=Dynamic(factor=2.0, original=20))), "how long a sequence is"),
}


def loaded(made: ModelSpec, seed: int = 0) -> LoadedModel:
    module = luban.build_model(made, seed=seed)
    return LoadedModel(spec=made, module=module, tokenizer=None, name="tiny", path=Path(), manifest=None)


def engine_for(model: LoadedModel, **options) -> luban.Engine:
    """A paged engine whose batch has these options."""
    engine = luban.Engine(model, paged=True)
    engine.batch = PagedBatch(model.module, **options)
    return engine


def random_requests(rng: random.Random, count: int) -> list[Request]:
    """Prompts that often begin alike, greedy; some with several continuations."""
    beginnings = [[rng.randrange(37) for _ in range(50)] for _ in range(3)]
    made = []
    for _ in range(count):
        prompt = rng.choice(beginnings)[: rng.randrange(50)] + [rng.randrange(37) for _ in range(rng.randrange(1, 9))]
        sampling = Sampling(
            max_tokens=rng.choice([1, 4, 10, 18]), temperature=0, n=rng.choice([1, 1, 3]), ignore_eos=True, logprobs=0
        )
        made.append(Request(prompt, sampling))
    return made


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_are_those_of_the_contiguous_cache(variant):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, model = random.Random(seed), loaded(VARIANTS[variant], seed % 1000)
    size = rng.choice([1, 4, 16])
    blocks = rng.randrange(-(-CONTEXT // size), 2 * -(-CONTEXT // size))
    held = blocks * size * slot_bytes(model.module)
    engine = engine_for(model, max_batch=6, max_tokens=rng.randrange(7, 40), block_size=size, cache_bytes=held)
    batch = engine.batch
    requests = random_requests(rng, 6)
    cancelled = rng.choice(requests)
    for request in requests:
        engine.submit(request)
        for _ in range(rng.randrange(5)):
            engine.step()
            if request is cancelled and rng.random() < 0.5:
                request.cancel()
    while engine.step():
        pass
    assert batch.scheduler.manager.free == blocks and not engine.running
    for request in requests:
        alone = luban.Engine(model, paged=False).generate([request.prompt], replace(request.sampling, n=1))[0]
        for choice in request.result.choices:
            assert choice.token_ids == alone.token_ids[: len(choice.token_ids)]
            assert choice.finish_reason in ("length", "cancelled") and request.error is None
            found = [entry.logprob for entry in choice.logprobs]
            assert found == pytest.approx([e.logprob for e in alone.logprobs[: len(found)]], abs=1e-4)
            if not request.cancelled:
                assert len(choice.token_ids) == len(alone.token_ids)


@pytest.mark.parametrize("swap_bytes", [0, 5 * 4 * 512, 1 << 20], ids=["recompute", "some swap", "swap"])
@pytest.mark.parametrize("variant", ["rope", "encoder–decoder"])
def test_many_requests_in_little_memory_are_preempted_and_lose_nothing(variant, swap_bytes, seed=3):
    rng, model = random.Random(seed), loaded(VARIANTS[variant])
    cache_bytes = 13 * 4 * slot_bytes(model.module)
    engine = engine_for(model, max_batch=8, max_tokens=30, block_size=4, cache_bytes=cache_bytes, swap_bytes=swap_bytes)
    requests = [
        Request(
            [rng.randrange(37) for _ in range(rng.randrange(1, 20))],
            Sampling(max_tokens=30, temperature=1.0, top_p=0.9, n=2, seed=index, ignore_eos=True),
        )
        for index in range(5)
    ]
    for request in requests:
        engine.submit(request)
    while engine.step():
        pass
    scheduler = engine.batch.scheduler
    assert scheduler.preemptions > 5 and bool(scheduler.swaps) == bool(swap_bytes)
    assert scheduler.swaps == scheduler.preemptions or swap_bytes < 1 << 20
    for request in requests:
        alone = luban.Engine(model, paged=False).generate([request.prompt], request.sampling)[0]
        assert [c.token_ids for c in request.result.choices] == [c.token_ids for c in alone.choices]


@pytest.mark.parametrize("length", [32, 33])
def test_the_prefix_cache_changes_no_token(length):
    """Also of a prompt that is cached whole, up to the last slot of a block."""
    model, prompt = loaded(VARIANTS["t5"]), [index % 37 for index in range(length)]
    sampling = Sampling(max_tokens=20, temperature=0, ignore_eos=True)
    engine, without = engine_for(model), engine_for(model, prefix_cache=False)
    found = [each.generate([prompt], sampling)[0].token_ids for each in (engine, engine, without, without)]
    assert found[0] == found[1] == found[2] == found[3]
    assert engine.batch.scheduler.prefix_hits == (16 if length == 32 else 32)
    assert without.batch.scheduler.prefix_hits == 0


def test_keys_of_other_weights_are_forgotten():
    model, prompt = loaded(VARIANTS["rope"]), [index % 37 for index in range(60)]
    sampling = Sampling(max_tokens=10, temperature=0, ignore_eos=True)
    engine = luban.Engine(model)
    before = engine.generate([prompt], sampling)[0].token_ids
    other = loaded(VARIANTS["rope"], seed=5)
    with torch.no_grad():
        for mine, theirs in zip(model.module.parameters(), other.module.parameters(), strict=True):
            mine.copy_(theirs)
    after = engine.generate([prompt], sampling)[0].token_ids
    assert after == luban.Engine(other, paged=False).generate([prompt], sampling)[0].token_ids != before


def test_what_a_broken_sequence_leaves_in_a_block_reaches_nobody():
    """Free slots may hold anything, NaN too."""
    model = loaded(VARIANTS["alibi"])
    engine = engine_for(model, cache_bytes=8 * 16 * 512, block_size=16)
    for layer in engine.batch.runner.cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    prompts, sampling = [[3] * size for size in (1, 5, 20)], Sampling(max_tokens=9, temperature=0, ignore_eos=True)
    found = engine.generate(prompts, sampling)
    expected = luban.Engine(model, paged=False).generate(prompts, sampling)
    assert [result.token_ids for result in found] == [result.token_ids for result in expected]


@pytest.mark.parametrize("variant", CONTIGUOUS)
def test_models_that_cannot_be_paged_keep_the_contiguous_cache_and_say_why(variant):
    made, reason = CONTIGUOUS[variant]
    model = loaded(made)
    assert reason in paging_refusal(model.module)
    engine = luban.Engine(model)
    assert not isinstance(engine.batch, PagedBatch)
    assert len(engine.generate([[3, 4, 5]], Sampling(max_tokens=5, ignore_eos=True))[0].token_ids) == 5
    with pytest.raises(UnsupportedError, match=f"can't keep keys and values in blocks: .*{reason}"):
        luban.Engine(model, paged=True)


def test_a_layer_that_shares_parameters_has_keys_of_its_own():
    made = spec()
    shared = replace(made, layers=(made.layers[0], replace(made.layers[0], share=0)))
    model, sampling = loaded(shared), Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    pair = [luban.Engine(model, paged=paged).generate([[3, 4, 5]], sampling)[0].token_ids for paged in (True, False)]
    assert pair[0] == pair[1]


def test_packed_tokens_take_no_padding():
    model = luban.build_model(changed(spec(), layers=spec().layers[:1]))
    cache = PagedCache.of(model, blocks=1)
    packed = PackedTokens(torch.arange(3), torch.arange(3), torch.zeros(1, 1, dtype=torch.int32), (0,), (3,), 16)
    attention = PagedAttention(cache.layers, packed)
    model(torch.tensor([[1, 2, 3]]), attention=attention)
    for tokens, mask in (([[1, 2, 3]], torch.ones(1, 3, dtype=torch.bool)), ([[1, 2]], None)):
        with pytest.raises(UnsupportedError, match="without padding"):
            model(torch.tensor(tokens), mask, attention=attention)


def test_an_engine_that_broke_in_the_middle_of_a_step_begins_anew(monkeypatch):
    model, sampling = loaded(VARIANTS["rope"]), Sampling(max_tokens=5, temperature=0, ignore_eos=True)
    engine = luban.Engine(model)
    expected = engine.generate([[3] * 40], sampling)[0].token_ids
    with monkeypatch.context() as patch:
        patch.setattr("luban.serve.paged.verify", lambda *_: 1 / 0)
        engine.submit(request := Request([3] * 40, sampling))
        with pytest.raises(ZeroDivisionError):
            engine.step()
        engine.fail(RuntimeError("broken"))
    assert str(request.error) == "broken" and not engine.running and not engine.batch.sequences
    assert engine.generate([[3] * 40], sampling)[0].token_ids == expected
