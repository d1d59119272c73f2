"""ChatGLM-6B against its released computation written out, and ChatGLM2-6B against transformers' GLM class, both small."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import luban
from luban.generate.cache import ContiguousCache
from luban.load.model import LoadedModel
from luban.models.presets import PRESETS
from luban.models.spec import changed

transformers = pytest.importorskip("transformers")


def small(name, **changes):
    """The preset with small sizes and lively random weights."""
    spec = PRESETS[name]
    width, heads = changes.pop("width"), changes.pop("heads")
    mixer = replace(spec.layers[0].mixer, heads=heads, **changes.pop("mixer", {}))
    spec = changed(
        spec,
        width=width,
        layers=3,
        vocab_size=61,
        context=64,
        mixer=mixer,
        feedforward=replace(spec.layers[0].feedforward, width=2 * width),
        **changes,
    )
    model = luban.build_model(spec, dtype="float64").eval()
    torch.manual_seed(random.randrange(2**31))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else torch.nn.init.normal_(p, mean=0.5, std=0.3)
    return model


def chatglm(model, tokens, text, block):
    """One row (T,), token by token and head by head: weights named, nothing of the model's code called."""
    spec, w = model.spec, dict(model.named_parameters())
    heads, size, alpha = (
        spec.layers[0].mixer.heads,
        spec.width // spec.layers[0].mixer.heads,
        math.sqrt(2 * len(spec.layers)),
    )

    def norm(x, name):
        return F.layer_norm(x, (spec.width,), w[f"{name}.weight"], w[f"{name}.bias"], spec.last.norm.eps)

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def turn(v, t):
        out = v.clone()
        for half, place in ((0, text[t]), (1, block[t])):
            for i in range(size // 4):
                angle = place.item() * 10_000.0 ** (-2 * i / (size // 2))
                a, b = half * size // 2 + i, half * size // 2 + size // 4 + i
                out[a] = v[a] * math.cos(angle) - v[b] * math.sin(angle)
                out[b] = v[b] * math.cos(angle) + v[a] * math.sin(angle)
        return out

    x = w["decoder.embedding.tokens.weight"][tokens]
    for layer in range(len(spec.layers)):
        at = f"decoder.blocks.{layer}"
        read = norm(x, f"{at}.mixer_norm")
        q, k, v = (dense(read, f"{at}.mixer.qkv.{p}") for p in "qkv")
        mixed = torch.zeros_like(q)
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for t in range(len(tokens)):
                scores = torch.stack([turn(q[t, part], t) @ turn(k[s, part], s) for s in range(t + 1)])
                mixed[t, part] = torch.softmax(scores / math.sqrt(size), 0) @ v[: t + 1, part]
        read = norm(alpha * read + dense(mixed, f"{at}.mixer.output"), f"{at}.feedforward_norm")
        inner = dense(read, f"{at}.feedforward.up")
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = alpha * read + dense(inner, f"{at}.feedforward.down")
    return norm(x, "decoder.norm") @ w["decoder.embedding.tokens.weight"].T


def test_chatglm_6b_equals_its_computation_written_out():
    """Text before the blank, then the blank at one place with its own count, as it is generated."""
    model, tokens = small("chatglm-6b", width=24, heads=3), torch.randint(0, 61, (2, 9))
    text, block = torch.tensor([0, 1, 2, 3, 4, 5, 5, 5, 5]), torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 3])
    got = model(tokens, positions=torch.stack((text, block)).expand(2, 2, 9))
    for row in range(2):
        torch.testing.assert_close(got[row], chatglm(model, tokens[row], text, block), atol=1e-4, rtol=1e-4)
    plain, counted = model(tokens), torch.arange(9)
    torch.testing.assert_close(plain[0], chatglm(model, tokens[0], counted, torch.zeros(9)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b"])
def test_the_published_layout_out_and_in(name, tmp_path):
    """Names and the order of rows as their released code reads them, and the same logits back."""
    mixer = {"kv_heads": 2} if name == "chatglm2-6b" else {"kv_heads": 6}
    model = small(
        name,
        width=48,
        heads=6,
        mixer=mixer,
        **({"position": replace(PRESETS[name].position, width=4)} if name == "chatglm2-6b" else {}),
    ).float()
    loaded = LoadedModel(spec=model.spec, module=model, tokenizer=None, name=name, path=tmp_path, manifest=None)
    luban.export_model(loaded, tmp_path / "out")
    tensors, w = load_file(tmp_path / "out/model.safetensors"), dict(model.named_parameters())
    a = "decoder.blocks.1.mixer.qkv"
    if name == "chatglm-6b":
        read = F.linear(torch.eye(48), tensors["transformer.layers.1.attention.query_key_value.weight"])
        heads = read.view(48, 6, 3 * 8)  # their code: (…, heads, 3 · head width), then three pieces
        for i, p in enumerate("qkv"):
            torch.testing.assert_close(heads[..., 8 * i : 8 * i + 8].flatten(1), w[f"{a}.{p}.weight"].T)
    else:
        q, k, v = tensors["transformer.encoder.layers.1.self_attention.query_key_value.weight"].split([48, 16, 16])
        gate, up = tensors["transformer.encoder.layers.1.mlp.dense_h_to_4h.weight"].chunk(2)
        for got, p in zip((q, k, v), "qkv", strict=True):
            torch.testing.assert_close(got, w[f"{a}.{p}.weight"])
        torch.testing.assert_close(gate, w["decoder.blocks.1.feedforward.gate.weight"])
        torch.testing.assert_close(up, w["decoder.blocks.1.feedforward.up.weight"])
    back = luban.load_model(tmp_path / "out")
    assert changed(back.spec, init=model.spec.init) == changed(
        model.spec, mixer=replace(model.spec.layers[0].mixer, kv_heads=mixer["kv_heads"])
    )
    tokens = torch.randint(0, 61, (2, 9))
    torch.testing.assert_close(back.module(tokens), model(tokens), atol=1e-5, rtol=1e-5)


def test_chatglm2_6b_equals_transformers_glm():
    """The same parts under another name: partial interleaved rotation, grouped keys, biases on q, k and v alone."""
    model = small(
        "chatglm2-6b",
        width=48,
        heads=6,
        mixer={"kv_heads": 2},
        position=replace(PRESETS["chatglm2-6b"].position, width=4),
    ).float()
    theirs = transformers.GlmForCausalLM(
        transformers.GlmConfig(
            vocab_size=61,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            attention_bias=True,
            rms_norm_eps=model.spec.last.norm.eps,
            pad_token_id=0,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        )
    ).eval()
    w = dict(model.named_parameters())
    state = {
        "model.embed_tokens.weight": w["decoder.embedding.tokens.weight"],
        "model.norm.weight": w["decoder.norm.weight"],
        "lm_head.weight": w["head.weight"],
    }
    for i in range(3):
        ours, to = f"decoder.blocks.{i}", f"model.layers.{i}"
        for p in "qkv":
            state |= {f"{to}.self_attn.{p}_proj.{k}": w[f"{ours}.mixer.qkv.{p}.{k}"] for k in ("weight", "bias")}
        state |= {
            f"{to}.self_attn.o_proj.weight": w[f"{ours}.mixer.output.weight"],
            f"{to}.mlp.gate_up_proj.weight": torch.cat([w[f"{ours}.feedforward.{p}.weight"] for p in ("gate", "up")]),
            f"{to}.mlp.down_proj.weight": w[f"{ours}.feedforward.down.weight"],
            f"{to}.input_layernorm.weight": w[f"{ours}.mixer_norm.weight"],
            f"{to}.post_attention_layernorm.weight": w[f"{ours}.feedforward_norm.weight"],
        }
    theirs.load_state_dict(state)
    tokens = torch.randint(0, 61, (2, 13))
    expected = theirs(tokens).logits
    torch.testing.assert_close(model(tokens), expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    cache = ContiguousCache.of(model, 2)
    pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split([5, 1, 7], dim=1)], 1)
    torch.testing.assert_close(pieces, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
