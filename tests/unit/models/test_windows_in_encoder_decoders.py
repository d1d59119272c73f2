"""Windows, gaps and layouts in encoder–decoders: the same weights with dense attention under a mask written out by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import luban
from luban import build_model, describe
from luban.core.errors import ConfigError
from luban.generate.cache import ContiguousCache
from luban.load.model import LoadedModel
from luban.models.config import resolve_spec
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.presets import preset
from luban.models.spec import ModelSpec, uniform
from luban.nn.attention.backend import AttentionBackend
from luban.nn.attention.prepared_mask import PreparedMask
from luban.nn.feedforward.plain import ReLU
from luban.nn.init import FanInInit
from luban.nn.mixer.base import Mixer
from luban.nn.mixer.dilated import Dilated
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.layout import GlobalRandom, Local, Strided
from luban.nn.position.base import Position
from luban.nn.position.rope import Rope
from luban.nn.position.t5 import RelativeBias

HEADS, VOCABULARY = 2, 61


def model_spec(encoder: Mixer, decoder: Mixer, position: Position | None = None, layers: int = 2) -> ModelSpec:
    made = uniform(
        vocab_size=VOCABULARY,
        width=16,
        layers=layers,
        context=128,
        mixer=decoder,
        position=position or Rope(),
        feedforward=ReLU(width=24),
        body=EncoderDecoderBody(decoder_start=0),
        init=FanInInit(embedding=1.0),
    )
    return replace(made, encoder=tuple(replace(layer, mixer=encoder) for layer in made.encoder))


def visible(mixer: Mixer, tokens: int, *, causal: bool) -> Tensor:
    """(H, T, T) bool: head by head, whether token i may attend to token j."""
    here = torch.arange(tokens)
    i, j = here[:, None], here[None]
    seen = torch.ones(HEADS, tokens, tokens, dtype=torch.bool)
    if isinstance(mixer, Dilated):
        gaps = torch.tensor(mixer.dilations[:HEADS])[:, None, None]
        seen = ((i - j) % gaps == 0) & ((i - j).abs() // gaps < mixer.window)
    elif isinstance(mixer, Grouped) and mixer.window is not None:
        seen = seen & ((i - j).abs() < mixer.window)
    elif isinstance(mixer, Grouped) and mixer.layout is not None:
        table = mixer.layout.build(tokens, HEADS, causal, torch.device("cpu")).table
        seen = seen & table[:, i // mixer.layout.block, j // mixer.layout.block]
    return seen & (j <= i) if causal else seen


class WrittenOut(AttentionBackend):
    """Attention in which every query sees what the test says, whatever the layers want."""

    def __init__(self, mixer: Mixer, real_BT: Tensor, *, causal: bool):
        super().__init__()
        batch, tokens = real_BT.shape
        seen = torch.zeros(batch, HEADS, tokens, tokens, dtype=torch.bool)
        for row in range(batch):
            here = real_BT[row].nonzero().squeeze(1)  # places are counted in real tokens
            seen[row, :, here[:, None], here] = visible(mixer, len(here), causal=causal)
        seen |= torch.eye(tokens, dtype=torch.bool)  # padding's own softmax
        self.seen = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))

    def prepare(self, mask, shape, bias, dtype) -> PreparedMask:
        return PreparedMask(dense=self.seen if bias is None else self.seen + bias.dense())


CASES = {
    "window": (Grouped(heads=HEADS, window=4), Grouped(heads=HEADS)),
    "windows on both sides": (Grouped(heads=HEADS, window=3), Grouped(heads=HEADS, window=5)),
    "gaps": (Dilated(heads=HEADS, window=3, dilations=(1, 3)), Grouped(heads=HEADS, window=2)),
    "local": (Grouped(heads=HEADS, layout=Local(block=16, window=4)),) * 2,
    "strided": (Grouped(heads=HEADS, layout=Strided(block=16, window=0, stride=2)), Grouped(heads=HEADS, window=7)),
    "random blocks": (Grouped(heads=HEADS, layout=GlobalRandom(block=16, window=0, random=1)),) * 2,
}


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("position", [None, RelativeBias(buckets=8, max_distance=20)], ids=["rope", "t5"])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_dense_attention_under_the_mask(name, position, padding):
    encoder, decoder = CASES[name]
    if position is not None and isinstance(encoder, Dilated):
        encoder = Grouped(heads=HEADS, window=2)  # gaps take no bias
    model = build_model(model_spec(encoder, decoder, position), dtype="float64", seed=random.randrange(1000))
    plain = model_spec(Grouped(heads=HEADS), Grouped(heads=HEADS), position)
    dense = build_model(plain, dtype="float64")
    dense.load_state_dict(model.state_dict())
    source, target = torch.randint(0, VOCABULARY, (2, 70)), torch.randint(0, VOCABULARY, (2, 53))
    real = torch.ones_like(source, dtype=torch.bool)
    if padding != "none":
        real[1, 50:] = False
    real = real.flip(1) if padding == "left" else real
    mask = None if padding == "none" else real
    got = model(source, target, mask)
    states = dense.encode(source, mask, attention=WrittenOut(encoder, real, causal=False))
    everything = torch.ones_like(target, dtype=torch.bool)

    class Decoder(WrittenOut):
        def cross_attend(self, q_BHTD, project, states_BSE, mask, cache, scale):
            return AttentionBackend().cross_attend(q_BHTD, project, states_BSE, mask, None, scale)

    want = dense(None, target, encoder_states=states, attention=Decoder(decoder, everything, causal=True))
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    for (key, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-8, rtol=1e-7, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_targets_token_by_token_with_a_cache_are_the_whole(name):
    model = build_model(model_spec(*CASES[name]), dtype="float64", seed=random.randrange(1000))
    source, target = torch.randint(0, VOCABULARY, (2, 40)), torch.randint(0, VOCABULARY, (2, 45))
    real = torch.arange(40) < torch.tensor([[40], [23]])
    with torch.no_grad():
        cache, states = ContiguousCache.of(model, 2), model.encode(source, real)
        parts = [model(None, target[:, :20], cache=cache, encoder_states=states)]
        parts += [model(None, target[:, i : i + 1], cache=cache, encoder_states=states) for i in range(20, 45)]
        torch.testing.assert_close(torch.cat(parts, 1), model(source, target, real), atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_served_answers_are_the_likeliest_tokens_of_the_whole(name):
    module = build_model(model_spec(*CASES[name]), seed=random.randrange(1000)).eval()
    model = LoadedModel(spec=module.spec, module=module, tokenizer=None, name="tiny", path=Path(), manifest=None)
    sources = [torch.randint(1, VOCABULARY, (n,)).tolist() for n in (37, 9, 22)]
    results = luban.Engine(model).generate(sources, luban.Sampling(max_tokens=20, temperature=0))
    for source, result in zip(sources, results, strict=True):
        answer = [0]
        with torch.no_grad():
            for token in result.token_ids:
                logits = module(torch.tensor([source]), torch.tensor([answer]))[0, -1]
                assert logits[token] >= logits.max() - 1e-4
                answer.append(token)
        assert len(answer) == 21


def test_recipes_give_each_side_its_own_window_and_the_description_knows_it():
    spec = resolve_spec(
        {
            "width": 16,
            "layers": 2,
            "body": {"type": "encoder_decoder"},
            "layer": {"mixer": {"heads": 2, "kv_heads": 2}},
            "encoder": {"layers": 3, "layer": {"mixer": {"heads": 2, "kv_heads": 2, "window": 4}}},
        },
        53,
    )
    assert [layer.mixer.window for layer in (*spec.encoder, *spec.layers)] == [4, 4, 4, None, None]
    t5 = preset("t5-small")
    windowed = resolve_spec({"preset": "t5-small", "encoder": {"layer": {"mixer": {"window": 128}}}}, t5.vocab_size)
    assert windowed == replace(t5, encoder=tuple(replace(la, mixer=replace(la.mixer, window=128)) for la in t5.encoder))
    density = [op.mask_density for op in describe(spec, seq=64).ops if op.kind == "attention"]
    band = 1 - (1 - 4 / 64) ** 2  # of a square without the two triangles beside the diagonal
    assert density == [pytest.approx(band)] * 3 + [0.5, 1.0, 0.5, 1.0]
    with pytest.raises(ConfigError, match="the decoder of an encoder–decoder needs grouped"):
        model_spec(Grouped(heads=2), Dilated(heads=2))
