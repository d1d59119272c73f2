"""Encoders and heads: exact sizes, shapes, refusals, padding."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from luban import build_model, describe
from luban.core.errors import ConfigError, DataError
from luban.models.encoder import EncoderBody
from luban.models.encoder_presets import ENCODERS
from luban.models.head.language_model import LanguageModel
from luban.models.head.rows import Classes, Value
from luban.models.head.tokens import Span, TokenClasses
from luban.models.presets import preset
from luban.models.spec import ModelSpec, changed, uniform
from luban.nn.feedforward.plain import GELU
from luban.nn.mixer.grouped import Grouped

COUNTS = {  # of the published checkpoints, pretraining heads included
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
}


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name):
    assert preset(name).parameters == COUNTS[name]


@pytest.mark.parametrize("name", ENCODERS)
def test_built_models_have_the_parameters_that_arithmetic_says(name):
    spec = preset(name)
    assert spec.parameters == sum(p.numel() for p in build_model(spec, device="meta").parameters())


@pytest.mark.parametrize("name", ["albert-base", "albert-xxlarge"])
def test_albert_is_constant_in_depth_and_matches_its_formula(name):
    spec = preset(name)
    assert changed(spec, layers=3).parameters == spec.parameters
    width, table, vocab = spec.width, 128, 30_000
    block = 4 * (width * width + width) + 2 * 4 * width * width + 5 * width + 4 * width
    body = (vocab + 512 + 2 + 2) * table + table * width + width + block
    head = width * table + 3 * table + vocab + width * width + width + 2 * width + 2
    assert spec.parameters == body + head


@pytest.mark.parametrize("name", ["bert-large", "albert-xxlarge", "roberta-base"])
def test_flops_follow_from_the_layers(name):
    spec = preset(name)
    one, two = (describe(changed(spec, layers=n), batch=2, seq=128).forward_flops for n in (1, 2))
    tokens = 2 * 128
    assert two - one == 2 * tokens * (4 * spec.width**2 + 8 * spec.width**2) + 4 * 2 * 128**2 * spec.width


def tiny(head, *, body=None) -> ModelSpec:
    return changed(
        preset("bert-base"),
        vocab_size=97,
        width=24,
        layers=2,
        head=head,
        body=body or preset("bert-base").body,
        mixer=Grouped(heads=3, qkv_bias=True, output_bias=True),
        tied_head=False,
    )


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (Classes(count=5), (3, 5)),
        (Classes(count=4, pooling="mean", dense=False), (3, 4)),
        (Classes(pooling="last"), (3, 2)),
        (TokenClasses(count=7), (3, 11, 7)),
        (Span(), (3, 11, 2)),
        (Value(), (3,)),
        (LanguageModel(bias=True), (3, 11, 97)),
    ],
)
@pytest.mark.parametrize("body", ["encoder", "decoder"])
def test_heads_give_their_shapes_whatever_the_padding(head, shape, body):
    spec = (
        tiny(head)
        if body == "encoder"
        else uniform(vocab_size=97, width=24, layers=2, head=head, mixer=Grouped(heads=3))
    )
    model = build_model(spec, seed=random.SystemRandom().randrange(2**31))
    assert spec.parameters == sum(p.numel() for p in model.parameters())
    tokens = torch.randint(0, 97, (3, 11))
    assert model(tokens).shape == shape
    mask = torch.arange(11) < torch.tensor([[11], [4], [1]])
    flipped = mask.flip(-1)
    rolled = torch.stack([row.roll(11 - int(n.sum())) for row, n in zip(tokens, mask, strict=True)])
    right, left = model(tokens, mask), model(rolled, flipped)
    if len(shape) == 3:
        right, left = right[mask], left[flipped]
    torch.testing.assert_close(right, left, atol=1e-5, rtol=1e-4)
    row = model(tokens[1:2, :4])[0]
    torch.testing.assert_close(model(tokens, mask)[1][:4] if len(shape) == 3 else right[1], row, atol=1e-5, rtol=1e-4)


def test_a_masked_first_token_changes_what_the_classes_say_but_padding_does_not():
    model = build_model(tiny(Classes()))
    tokens, mask = torch.randint(0, 97, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 97
    torch.testing.assert_close(model(tokens, mask), model(other, mask))
    other[:, 5] = (other[:, 5] + 1) % 97
    assert (model(tokens, mask) - model(other, mask)).abs().max() > 1e-6


def test_what_does_not_go_together_is_refused():
    first = preset("bert-base").layers[0]
    other = replace(first, feedforward=GELU(width=5), share=0)
    for layers in (
        (first, replace(first, share=1)),
        (first, other),
        (first, replace(first, share=0), replace(first, share=1)),
    ):
        with pytest.raises(ConfigError, match="which must be an earlier layer with the same settings"):
            changed(preset("bert-base"), layers=layers)
    with pytest.raises(ConfigError, match="head can't be tied: it reads 24 numbers a token, the embedding has 8"):
        replace(tiny(LanguageModel(), body=EncoderBody(embeddings=8)), tied_head=True)
    model = build_model(tiny(Span(), body=EncoderBody()))
    with pytest.raises(DataError, match="no table of segments"):
        model(torch.zeros(1, 3, dtype=torch.long), segments=torch.zeros(1, 3, dtype=torch.long))
