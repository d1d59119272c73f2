"""What every token mixer must do besides attention: keep documents and padding apart, see no later token, continue from its
state, train and resume, be written down, and be refused by name where it can't stand."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from counted import HostTensors
from drawn import drawn
from families import Family, engine_of, packed_batch

from luban import Engine, build_model
from luban.core.errors import ConfigError, DataError, UnsupportedError
from luban.core.plan import ParallelPlan
from luban.generate.cache import ContiguousCache
from luban.generate.sampling import Sampling
from luban.load.model import LoadedModel
from luban.models.arrangement.reversible import Reversible
from luban.models.config import config_of, resolve_spec
from luban.models.decoder import DecoderBody
from luban.models.encoder import EncoderBody
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.layer import LayerSpec
from luban.models.spec import ModelSpec, spec_from_dict, spec_to_dict, uniform
from luban.nn.attention.backend import AttentionBackend
from luban.nn.context import LayerContext
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.init import NormalInit
from luban.nn.mixer.dilated import ClassAttention, Dilated
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.hyena import Hyena
from luban.nn.mixer.lsh import LSH
from luban.nn.mixer.routing import Routing
from luban.nn.position.alibi import Alibi
from luban.nn.position.learned import Learned
from luban.objectives.causal import Causal

MIXERS = {
    "dilated": Dilated(heads=2, window=4, dilations=(1, 3)),
    "hyena": Hyena(order=3, filter_width=16),
    "lsh": LSH(heads=2, buckets=4, span=5, rounds=2, eval_rounds=3),
    "routing": Routing(heads=2, local_heads=1, window=7, clusters=3, size=6),
    "top": Routing(heads=2, local_heads=1, window=7, clusters=3, size=6, members="top"),
}
CAUSAL = [name for name in MIXERS if name != "top"]  # what a cluster takes depends on the whole row
VOCAB, CONTEXT = 53, 64


def registered(name: str) -> str:
    """What a recipe calls it."""
    return MIXERS[name].registry.name_of(type(MIXERS[name]))


def make(name: str, mixed: bool = False, **changes) -> ModelSpec:
    """Two layers of this mixer, or one, one of attention and a reversible one."""
    base = {
        "vocab_size": VOCAB,
        "width": 24,
        "context": CONTEXT,
        "feedforward": SwiGLU(width=20),
        "init": NormalInit(std=0.3),
    }
    spec = uniform(**base, layers=2, mixer=MIXERS[name], **changes)
    if not mixed:
        return spec
    attention = LayerSpec(mixer=Grouped(heads=2, window=9), feedforward=SwiGLU(width=20))
    turned = replace(spec.layers[1], arrangement=Reversible(chunks=2))
    return replace(spec, layers=(spec.layers[0], attention, turned))


def built(spec: ModelSpec):
    return build_model(spec, dtype="float64", seed=random.randrange(1000)).eval()


def loaded(spec: ModelSpec) -> LoadedModel:
    module = build_model(spec, seed=random.randrange(1000)).eval()
    return LoadedModel(
        spec=spec, module=module, tokenizer=None, name="small", path=Path(), manifest=None, stop_ids=(VOCAB - 1,)
    )


@pytest.mark.parametrize("name", MIXERS)
def test_no_token_depends_on_a_later_one_or_on_another_document(name):
    model, T = built(make(name, mixed=True)), random.randint(30, CONTEXT)
    documents = torch.sort(torch.randint(0, 4, (1, T)), 1).values
    kept = []
    model.decoder.embedding.register_forward_hook(lambda *call: kept.append(call[2]))
    for given in ({}, {"documents": documents}):
        kept.clear()
        out = model(torch.randint(0, VOCAB, (1, T)), **given)
        for i in random.sample(range(T), 6):
            (gradient,) = torch.autograd.grad(out[0, i].square().sum(), kept[0], retain_graph=True)
            seen = gradient[0].abs().amax(-1) > 1e-9 * gradient.abs().max()  # transforms round in all places
            assert not seen[i + 1 :].any() and seen[i]
            if given:
                assert not seen[documents[0] != documents[0, i]].any()


@pytest.mark.parametrize("name", CAUSAL)
def test_later_tokens_other_documents_and_padding_change_no_value(name):
    """Stronger than gradients: what a token chooses to see must not depend on them either."""
    model, T = built(make(name, mixed=True)), 48
    tokens = torch.randint(0, VOCAB, (1, T))
    cut = random.randint(5, 40)
    whole = model(tokens)
    torch.testing.assert_close(model(tokens[:, :cut]), whole[:, :cut], atol=1e-10, rtol=0)
    documents = torch.sort(torch.randint(0, 3, (1, T)), 1).values
    packed = model(tokens, documents=documents)
    for document in documents.unique():
        mine = documents[0] == document
        torch.testing.assert_close(model(tokens[:, mine]), packed[:, mine], atol=1e-10, rtol=0)
    for left in (True, False):
        pad = torch.randint(0, VOCAB, (1, 7))
        row = torch.cat((pad, tokens) if left else (tokens, pad), 1)
        real = torch.ones_like(row, dtype=torch.bool)
        real[:, slice(None, 7) if left else slice(T, None)] = False
        torch.testing.assert_close(model(row, real)[real], whole[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_in_pieces_with_a_cache_are_the_whole_row(name):
    model, cache = built(make(name, mixed=True)), None
    tokens = torch.randint(0, VOCAB, (2, 50))
    cache = ContiguousCache.of(model, 2)
    pieces = torch.tensor_split(torch.arange(50), [20, 21, 28, *range(29, 50)])
    with torch.no_grad():
        parts = [model(tokens[:, piece], cache=cache) for piece in pieces]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", MIXERS)
def test_served_texts_are_those_of_the_whole_model_whoever_shares_the_batch(name):
    spec = make(name, mixed=name in CAUSAL)
    if name not in CAUSAL:
        # A text's earlier tokens, read anew in every forward of the whole, may be taken by other clusters: one layer; and equal
        # tokens must not be equally near.
        spec = replace(spec, layers=spec.layers[:1], position=Learned())
    model = loaded(spec)
    engine = Engine(model)
    prompts = [[random.randrange(VOCAB - 1) for _ in range(n)] for n in (3, 17, 8)]
    sampling = Sampling(max_tokens=9, temperature=0.0)
    with pytest.raises(
        UnsupportedError, match=f"its mixer {registered(name)} keeps other numbers of every token than keys and values"
    ):
        Engine(model, paged=True)
    for prompt, result in zip(prompts, engine.generate(prompts, sampling), strict=True):
        row = list(prompt)
        for _ in range(9):
            with torch.no_grad():
                row.append(int(model.module(torch.tensor([row]))[0, -1].argmax()))
            if row[-1] == VOCAB - 1:
                break
        assert result.choices[0].token_ids == row[len(prompt) :][: len(result.choices[0].token_ids)]


@pytest.mark.parametrize("name", drawn(MIXERS, 2))
def test_trains_and_goes_on_bit_by_bit_and_survives_being_written(name):
    spec = replace(make(name, mixed=True), vocab_size=packed_vocabulary())
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec
    assert resolve_spec(json.loads(json.dumps(config_of(spec))), spec.vocab_size) == spec
    family, rng = Family(spec, Causal(), packed_batch), np.random.default_rng(random.randrange(2**31))
    batches = [packed_batch(4, rng)] * 6

    def run(engine, batches):
        losses = []
        for number, batch in enumerate(batches):
            torch.manual_seed(number + run.done)
            losses.append(engine.step(batch).loss)
        run.done += len(batches)
        return losses

    run.done = 0
    whole = engine_of(family, seed=3)
    losses = run(whole, batches)
    assert losses[-1] < losses[0]
    run.done = 0
    first = engine_of(family, seed=3)
    run(first, batches[:3])
    second = engine_of(family, seed=4)
    second.load_state_dict(first.state_dict())
    assert run(second, batches[3:]) == losses[3:]


def packed_vocabulary() -> int:
    from families import VOCAB as vocabulary

    return vocabulary


@pytest.mark.parametrize("name", MIXERS)
def test_where_it_cannot_stand_it_is_refused_by_name_with_the_alternatives(name):
    parts = {"vocab_size": VOCAB, "width": 24, "layers": 1, "context": CONTEXT}
    with pytest.raises(
        ConfigError, match=rf"layer 0 can't have the mixer {registered(name)}: it has no cross-attention.*needs grouped"
    ):
        crossing = LayerSpec(mixer=MIXERS[name], cross=True)
        ModelSpec(
            vocab_size=VOCAB,
            width=24,
            layers=(crossing,),
            encoder=(LayerSpec(mixer=Grouped(heads=2)),),
            body=EncoderDecoderBody(),
        )
    if not MIXERS[name].bidirectional:
        with pytest.raises(
            ConfigError, match=rf"layer 0 can't have the mixer {registered(name)}: .*an encoder needs grouped"
        ):
            uniform(**parts, mixer=MIXERS[name], body=EncoderBody())
    with pytest.raises(ConfigError, match="positions"):
        uniform(**parts, mixer=MIXERS[name], position=Alibi())
    with pytest.raises(DataError, match="drop `segments`"):
        tokens = torch.randint(0, VOCAB, (1, 8))
        build_model(uniform(**parts, mixer=MIXERS[name]))(tokens, segments=torch.zeros_like(tokens))
    family = Family(uniform(**parts | {"vocab_size": packed_vocabulary()}, mixer=MIXERS[name]), Causal(), packed_batch)
    for axis in MIXERS[name].undivided - {"replicate"}:
        from luban.parallel.mixers import check_mixers

        with pytest.raises(ConfigError, match=rf"the mixer {registered(name)} does not go with plan.{axis}"):
            check_mixers(family.spec, ParallelPlan(**{axis: 2}))


@pytest.mark.parametrize("causal", [True, False])
def test_dilated_heads_see_every_so_many_th_token_of_the_document(causal):
    window, gap, T = random.randint(1, 5), random.randint(1, 6), 60
    mixer = Dilated(heads=1, window=window, dilations=(gap,))
    model = built(
        uniform(
            vocab_size=VOCAB,
            width=24,
            layers=1,
            context=CONTEXT,
            mixer=mixer,
            body=DecoderBody() if causal else EncoderBody(),
        )
    )
    starts = sorted(random.sample(range(1, T), 2))
    documents = torch.bucketize(torch.arange(T), torch.tensor(starts), right=True)[None]
    kept = []
    model.get_submodule("decoder" if causal else "encoder").embedding.register_forward_hook(
        lambda *call: kept.append(call[2])
    )
    out = model(torch.randint(0, VOCAB, (1, T)), documents=documents)
    for i in random.sample(range(T), 8):
        (gradient,) = torch.autograd.grad(out[0, i].square().sum(), kept[0], retain_graph=True)
        for j in range(T):
            apart = i - j if causal else abs(i - j)
            wanted = 0 <= apart < window * gap and apart % gap == 0 and documents[0, i] == documents[0, j]
            assert bool(gradient[0, j].abs().max() > 1e-12) == bool(wanted), (i, j, window, gap)


def test_heads_with_different_gaps_see_tokens_at_multiples_of_their_own():
    T, heads, gaps = 30, 5, tuple(random.sample(range(1, 6), 3))
    mixer = Dilated(heads=heads, window=T, dilations=gaps)
    attention = ClassAttention(mixer, causal=True)
    q, k, v = (torch.randn(2, heads, T, 4, dtype=torch.float64) for _ in range(3))
    found = attention(q, k, v, LayerContext(AttentionBackend(), None, None, None, None))
    apart = torch.arange(T)[:, None] - torch.arange(T)
    gaps_H = torch.tensor([gaps[h % len(gaps)] for h in range(heads)])
    seen = (apart >= 0) & (apart % gaps_H[:, None, None] == 0)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert torch.allclose(found, wanted, atol=1e-9)


@pytest.mark.parametrize("name", MIXERS)
def test_a_forward_makes_no_tensor_of_numbers_on_the_host(name):
    model = built(uniform(vocab_size=VOCAB, width=24, layers=1, context=CONTEXT, mixer=MIXERS[name]))
    tokens = torch.randint(0, VOCAB, (2, 20))
    documents = (torch.rand(2, 20) < 0.1).int().cumsum(1)
    with HostTensors() as made:
        model(tokens, documents=documents)
        assert made.count == 0
        torch.tensor([1.0])
    assert made.count == 1


def test_rows_longer_than_hyenas_filters_and_positions_of_one_layer_are_refused():
    model = build_model(uniform(vocab_size=VOCAB, width=24, layers=1, context=16, mixer=Hyena()))
    with pytest.raises(DataError, match="filters reach over the model's context of 16 tokens, a row has 17"):
        model(torch.randint(0, VOCAB, (1, 17)))
    layer = LayerSpec(mixer=Hyena(), position=Learned())
    with pytest.raises(ConfigError, match="layer 0"):
        ModelSpec(vocab_size=VOCAB, width=24, context=16, layers=(layer,))
    with pytest.raises(ConfigError, match="hyena's order must be at least 1, 0 given"):
        Hyena(order=0)


def test_a_recipe_and_the_command_line_choose_the_mixer():
    table = {"width": 32, "layers": 3, "layer": {"mixer": {"type": "hyena", "order": 3}}}
    spec = resolve_spec({**table, "pattern": [{"at": [1], "mixer": {"type": "grouped", "heads": 4}}]}, VOCAB)
    assert [type(layer.mixer) for layer in spec.layers] == [Hyena, Grouped, Hyena] and spec.layers[2].mixer.order == 3
