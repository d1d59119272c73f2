"""Attention weights that are shown against those that the model's outputs imply, and the page."""

from __future__ import annotations

import base64
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from tiny_models import write_checkpoint

from luban.cli.report import run
from luban.core.errors import DataError, UnsupportedError, UsageError
from luban.load.model import load_model
from luban.models.encoder import EncoderBody
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.layer import LayerSpec
from luban.models.recurrent import RecurrentBody
from luban.models.spec import uniform
from luban.nn.attention.recording import LayerWeights, recording
from luban.nn.init import NormalInit
from luban.nn.mixer.dilated import Dilated
from luban.nn.mixer.grouped import Grouped
from luban.nn.mixer.hyena import Hyena
from luban.nn.mixer.lsh import LSH
from luban.nn.mixer.routing import Routing
from luban.nn.position.alibi import Alibi
from luban.report.attention import attention_between, attention_of, attention_page, head_figures

BASE = {"vocab_size": 272, "width": 24, "layers": 1, "context": 64, "init": NormalInit(std=0.4)}
MIXERS = {
    "window": Grouped(heads=4, kv_heads=2, window=5),
    "lsh": LSH(heads=2, buckets=4, span=4, rounds=2),
    "dilated": Dilated(heads=2, window=3, dilations=(1, 2)),
    "routing": Routing(heads=4, local_heads=2, window=4, clusters=2, size=6),
}


@pytest.fixture
def saved(tmp_path):
    def save(spec, name="model"):
        return write_checkpoint(tmp_path / name, spec)

    return save


@pytest.mark.parametrize("name", MIXERS)
def test_weights_are_those_that_mix_the_values(saved, name):
    model = load_model(str(saved(uniform(**BASE, mixer=MIXERS[name]))))
    tokens, found = attention_of(model, "What is attended to here?")
    assert len(tokens) == len(found[0].weights_HTS[0])
    kept = []
    mixer = model.module.decoder.blocks["0"].mixer
    mixer.output.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    joint = mixer.qv if name == "lsh" else mixer.qkv
    joint.register_forward_hook(lambda _, args, out: kept.append(out[-1]))
    ids = model.tokenizer.encode("What is attended to here?", bos=model.begins_with_bos)
    with torch.no_grad():
        model.module(torch.tensor([ids]))
    values, mixed = (x[0].unflatten(-1, (-1, mixer.head_dim)).transpose(0, 1) for x in kept)
    weights = torch.cat([layer.weights_HTS for layer in sorted(found, key=lambda each: each.kind)])
    wanted = weights @ values.repeat_interleave(len(weights) // len(values), 0)
    torch.testing.assert_close(mixed, wanted, atol=1e-4, rtol=1e-4)
    assert (weights.sum(-1) - 1).abs().max() < 1e-4 and weights.triu(1).abs().max() == 0


def test_biases_masks_and_layers_that_share_parameters_are_recorded_in_order(saved):
    layer = LayerSpec(mixer=Grouped(heads=2))
    fields = {key: value for key, value in BASE.items() if key != "layers"}
    spec = uniform(**BASE, mixer=Grouped(heads=2), position=Alibi())
    spec = replace(spec, layers=(layer, replace(layer, share=0), LayerSpec(mixer=Hyena()), layer))
    model = load_model(str(saved(spec)))
    _, found = attention_of(model, "abc def")
    assert [each.layer for each in found] == [0, 1, 3] and fields
    encoder = load_model(str(saved(uniform(**BASE, mixer=Grouped(heads=2), body=EncoderBody()), "encoder")))
    _, both = attention_of(encoder, "abc def")
    assert both[0].weights_HTS.triu(1).max() > 0


def test_entropy_and_distance_by_hand():
    even = torch.tril(torch.ones(3, 3))
    even = even / even.sum(-1, keepdim=True)
    (found,) = head_figures([LayerWeights(2, "attention", even[None])])
    assert found.entropy == pytest.approx((0 + 1 + math.log2(3)) / 3)
    assert found.distance == pytest.approx((0 + 0.5 + 1) / 3)
    assert found.on_first == pytest.approx((1 + 1 / 2 + 1 / 3) / 3) == pytest.approx(found.on_itself)


def test_the_page_needs_nothing_but_itself_and_its_squares_are_the_weights(saved, tmp_path, capsys):
    folder = saved(uniform(**BASE, mixer=MIXERS["routing"]))
    text = "Quoted <b>text</b> & more"
    run([str(folder), "--attention", text, "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert "Quoted &lt;b&gt;" in page and "http" not in page.replace("http-equiv", "") and "<b>text" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    model = load_model(str(folder))
    tokens, found = attention_of(model, text)
    assert data["tokens"] == tokens and len(data["heads"]) == page.count("<canvas") == 4
    raw = torch.frombuffer(bytearray(base64.b64decode(data["heads"][0])), dtype=torch.uint8).view(len(tokens), -1)
    torch.testing.assert_close((raw.float() / 255) ** 2, found[0].weights_HTS[0], atol=5e-3, rtol=0)


SIDES = {**BASE, "layers": 2, "mixer": Grouped(heads=2), "body": EncoderDecoderBody(decoder_start=3)}


def test_both_stacks_and_the_attention_between_them_are_those_that_mix_the_values(saved):
    model = load_model(str(saved(uniform(**SIDES, encoder_layers=3))))
    source, read, found = attention_between(model, "What is this?", "Something else")
    assert (len(source), len(read)) == (14, 15) and read[0] == model.tokenizer.token(3)
    kinds = [(each.stack, each.layer, each.kind) for each in found]
    assert kinds[:3] == [("encoder", i, "attention") for i in range(3)]
    assert kinds[3:] == [("decoder", i, kind) for i in range(2) for kind in ("attention", "cross-attention")]
    kept, block = [], model.module.decoder.blocks["1"]
    block.cross.output.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    block.cross.kv.register_forward_hook(lambda _, args, out: kept.append(out[-1]))
    ids = model.tokenizer.encode("What is this?", bos=model.begins_with_bos, eos=model.ends_with_eos)
    target = [3, *model.tokenizer.encode("Something else")]
    with torch.no_grad():
        model.module(torch.tensor([ids]), torch.tensor([target]))
    values, mixed = (x[0].unflatten(-1, (2, -1)).transpose(0, 1) for x in kept)
    weights = found[-1].weights_HTS
    assert weights.shape == (2, len(target), len(ids)) and (weights.sum(-1) - 1).abs().max() < 1e-5
    torch.testing.assert_close(mixed, weights @ values, atol=1e-4, rtol=1e-4)


def test_the_page_of_an_encoder_decoder_shows_what_it_writes(saved, tmp_path):
    folder = saved(uniform(**SIDES))
    run([str(folder), "--attention", "abc", "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert page.count("<canvas") == len(data["heads"]) == 2 * (2 + 2 + 2) and "Decoder layer 1: cross-attention" in page
    assert 1 < len(data["target"]) <= 64 and 'data-queries="target" data-keys="tokens"' in page
    crossed = data["heads"][6]
    assert len(base64.b64decode(crossed)) == len(data["target"]) * len(data["tokens"])
    plain = load_model(str(saved(uniform(**BASE, mixer=Grouped(heads=2)), "plain")))
    with pytest.raises(UnsupportedError, match="leave --attention-target out"):
        attention_page(plain, "abc", "def")


def test_hooks_are_gone_after_a_forward(saved):
    model = load_model(str(saved(uniform(**BASE, mixer=MIXERS["lsh"]))))
    attention_of(model, "abc")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())
    with pytest.raises(RuntimeError, match="stop"), recording(list(model.module.decoder.blocks.values())):
        raise RuntimeError("stop")
    assert not any(part._forward_hooks for part in model.module.modules())


def test_what_has_no_weights_is_refused_by_name(saved):
    hyena = load_model(str(saved(uniform(**BASE, mixer=Hyena()))))
    with pytest.raises(UnsupportedError, match="its mixers are hyena"):
        attention_page(hyena, "abc")
    fields = {"vocab_size": 272, "width": 16, "context": 64, "body": RecurrentBody()}
    recurrent = load_model(str(saved(uniform(**fields), "recurrent")))
    with pytest.raises(UnsupportedError, match="body is recurrent"):
        attention_page(recurrent, "abc")
    plain = load_model(str(saved(uniform(**BASE, mixer=Grouped(heads=2)), "plain")))
    with pytest.raises(DataError, match="tokens, and a page shows at most 64"):
        attention_page(plain, "x" * 300)
    with pytest.raises(UsageError, match="shows one model, 2 given"):
        run(["a", "b", "--attention", "abc"])


def test_an_empty_text_and_a_target_alone_are_refused_instead_of_another_page(saved, tmp_path):
    folder, page = str(saved(uniform(**BASE, mixer=MIXERS["window"]))), tmp_path / "page.html"
    with pytest.raises(DataError, match="has no tokens: give --attention a text"):
        run([folder, "--attention", "", "--out", str(page)])
    with pytest.raises(UsageError, match="--attention-target does nothing without --attention"):
        run([folder, "--attention-target", "abc", "--out", str(page)])
    assert not page.exists()
