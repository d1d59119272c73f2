"""Encoder–decoders: exact sizes, causality, refusals."""

from __future__ import annotations

import pytest
import torch

from luban import build_model
from luban.core.errors import ConfigError, DataError
from luban.models.arrangement.parallel import Parallel
from luban.models.encoder_decoder_presets import ENCODER_DECODERS
from luban.models.presets import preset
from luban.models.spec import changed
from luban.nn.feedforward.plain import ReLU
from luban.nn.mixer.grouped import Grouped


def test_published_parameter_counts():
    assert preset("bart-base").parameters == 139_420_416 + 50_265
    assert preset("bart-large").parameters == 406_291_456 + 50_265
    assert preset("t5-small").parameters == 60_506_624
    assert preset("t5-base").parameters == 222_903_552


@pytest.mark.parametrize(("name", "width"), [("transformer-base", 512), ("transformer-big", 1024)])
def test_the_original_transformers_size_from_its_equations(name, width):
    attention, feedforward, norm = 4 * width**2, 8 * width**2 + 5 * width, 2 * width
    encoder, decoder = attention + feedforward + 2 * norm, 2 * attention + feedforward + 3 * norm
    assert preset(name).parameters == 37_000 * width + 6 * (encoder + decoder)
    assert (
        round(preset(name).parameters / 1e6) == {"transformer-base": 63, "transformer-big": 214}[name]
    )  # table 3: 65, 213


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_built_models_have_the_parameters_that_arithmetic_says(name):
    spec = preset(name)
    assert spec.parameters == sum(p.numel() for p in build_model(spec, device="meta").parameters())


def tiny(**changes):
    small = {"vocab_size": 53, "width": 24, "layers": 2, "mixer": Grouped(heads=3), "feedforward": ReLU(width=32)}
    return changed(preset("transformer-base"), **(small | changes))


def test_the_decoder_sees_no_later_target_and_all_of_the_source():
    model = build_model(tiny())
    source, target = torch.randint(0, 53, (1, 6)), torch.randint(0, 53, (1, 5))
    before = model(source, target)
    later = target.clone()
    later[0, 3] = (later[0, 3] + 1) % 53
    after = model(source, later)
    torch.testing.assert_close(after[:, :3], before[:, :3], atol=0, rtol=0)
    assert (after[:, 3] - before[:, 3]).abs().max() > 1e-6
    other = source.clone()
    other[0, 5] = (other[0, 5] + 1) % 53
    assert (model(other, target)[:, 0] - before[:, 0]).abs().max() > 1e-6


def test_what_is_not_built_is_refused():
    with pytest.raises(ConfigError, match="encoder–decoders need pre or post"):
        tiny(arrangement=Parallel())
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(DataError, match="takes no documents"):
        build_model(tiny())(tokens, tokens, documents=tokens)
