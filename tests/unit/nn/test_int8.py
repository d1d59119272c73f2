"""Weights in 8 bits against their definition."""

from __future__ import annotations

import pytest
import torch

import luban
from luban.core.errors import ConfigError, UnsupportedError
from luban.load.export import parameters
from luban.models.arrangement.parallel import Parallel
from luban.models.spec import uniform
from luban.nn.feedforward.plain import GELU
from luban.nn.int8 import MOST_ROWS, Int8Weight, pack_for_inference
from luban.nn.mixer.grouped import Grouped


def test_weights_are_rounded_to_127_steps_a_row():
    weight, bias = torch.randn(48, 64) * torch.rand(48, 1), torch.randn(48)
    layer = Int8Weight(weight, bias)
    restored = layer.weight.float() * layer.scale.float()[:, None]
    step = weight.abs().amax(1, keepdim=True) / 127
    # half a step of rounding, and a scale kept to 8 bits of mantissa, which moves the largest by 127 · 2⁻⁸ steps
    assert ((restored - weight).abs() <= step * 1.01).all()
    rows = torch.randn(MOST_ROWS + 1, 64)
    torch.testing.assert_close(layer(rows), rows @ restored.t() + bias, atol=1e-5, rtol=1e-5)
    for few in (
        rows[:1],
        rows[:2],
        rows[:MOST_ROWS],
    ):  # through the 8-bit kernel in bfloat16: 2⁻⁸ of every product's size
        bound = (few.abs() @ restored.abs().t()) * 2**-7 + bias.abs() * 1e-5 + 1e-4
        assert ((layer(few[None])[0] - (few @ restored.t() + bias)).abs() <= bound).all()


@pytest.mark.parametrize("inputs", [1, 8, 33, 48, 60])
def test_any_number_of_inputs(inputs):
    layer, x = Int8Weight(torch.randn(21, inputs)), torch.randn(1, inputs)
    exact = x @ (layer.weight.float() * layer.scale.float()[:, None]).t()
    size = x.abs() @ (layer.weight.float() * layer.scale.float()[:, None]).abs().t()
    assert ((layer(x) - exact).abs() <= size * 2**-7 + 1e-4).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": True},
        {
            "mixer": Grouped(heads=4, qkv_bias=True, output_bias=True),
            "feedforward": GELU(width=96, bias=True),
            "arrangement": Parallel(norms=1),
        },
    ],
)
def test_a_packed_model_stays_near_the_plain_one(changes):
    spec = uniform(**{"vocab_size": 160, "width": 64, "layers": 2, "mixer": Grouped(heads=4, kv_heads=2), **changes})
    model, packed = luban.build_model(spec, seed=3).eval(), luban.build_model(spec, seed=3).eval()
    pack_for_inference(packed)
    left = {name for name, p in packed.named_parameters() if p.dtype == torch.float32 and p.dim() > 1}
    assert left == {"decoder.embedding.tokens.weight"} and any(p.dtype == torch.int8 for p in packed.parameters())
    tokens = torch.randint(0, 160, (2, 12))
    with torch.inference_mode():
        plain, eight, single = model(tokens), packed(tokens), packed(tokens[:1, :1])
    assert (eight - plain).norm() < 0.03 * plain.norm()
    assert (single - plain[:1, :1]).norm() < 0.03 * plain[:1, :1].norm()
    with pytest.raises(UnsupportedError, match="load it in float32 to write it"):
        parameters(packed)


def test_no_rows_give_no_rows():
    """As where a step of serving reads a part of a prompt, whose next token nobody asks for."""
    layer, x = Int8Weight(torch.randn(21, 16), torch.randn(21)), torch.empty(1, 0, 16)
    assert layer(x).shape == (1, 0, 21)


def test_off_the_cpu_it_is_refused():
    model = luban.build_model(uniform(), device="meta")
    with pytest.raises(ConfigError, match="run on a CPU or a CUDA GPU, not on meta"):
        pack_for_inference(model)
