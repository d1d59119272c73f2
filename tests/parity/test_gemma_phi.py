"""Gemma 1 and 3 and Phi 1 to 4 against transformers: logits, padding, generation, and out again."""

from __future__ import annotations

import random

import pytest
import torch

import luban
from luban.core.errors import UnsupportedError
from luban.models.convert.base import FORMATS

transformers = pytest.importorskip("transformers")
KINDS = ("gemma", "gemma", "gemma3_text", "gemma3_text", "gemma3_text", "phi", "phi", "phi3", "phi3")


def random_config(rng: random.Random, kind: str):
    """A small model of odd sizes."""
    kv_heads, head = rng.choice([1, 2]), rng.choice([8, 12])
    heads, layers = kv_heads * rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
    theta = rng.choice([100.0, 10_000.0])
    share = {"partial_rotary_factor": rng.choice([0.5, 1.0]), "rope_type": "default", "rope_theta": theta}
    own = {
        "gemma": {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "head_dim": head},
        "gemma3_text": {
            "head_dim": head,
            "query_pre_attn_scalar": rng.choice([head, 7]),
            "sliding_window": rng.choice([2, 5]),
            "layer_types": rng.choice([None, rng.choices(["sliding_attention", "full_attention"], k=layers)]),
            "rope_parameters": rng.choice(
                [
                    None,
                    {
                        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
                    },
                ]
            ),
        },
        "phi": {"rope_parameters": share, "layer_norm_eps": rng.choice([1e-5, 1e-3])},
        "phi3": {"rope_parameters": share, "sliding_window": rng.choice([None, 3]), "pad_token_id": 0},
    }[kind]
    return transformers.AutoConfig.for_model(
        kind,
        vocab_size=rng.randrange(31, 301, 2),
        hidden_size=heads * head,
        intermediate_size=rng.randrange(9, 70),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
        initializer_range=0.2,
        **own,
    )


@pytest.fixture(params=range(len(KINDS)), ids=lambda i: f"{KINDS[i]}-{i}")
def pair(request, tmp_path):
    """(theirs, ours) with the same random weights, biases and norms included."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    config = random_config(random.Random(seed), KINDS[request.param])
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, luban.load_model(tmp_path / "theirs")


def test_logits_equal_and_every_field_is_read(pair):
    theirs, ours = pair
    assert ours.unread == ()
    for length in (1, 2, 17):
        tokens = torch.randint(0, ours.spec.vocab_size, (3, length))
        torch.testing.assert_close(ours.module(tokens), theirs(tokens).logits, atol=2e-4, rtol=1e-5)


def test_greedy_generation_equals_theirs(pair):
    theirs, ours = pair
    prompts = [torch.randint(0, ours.spec.vocab_size, (n,)).tolist() for n in (1, 4, 9)]
    results = luban.Engine(ours).generate(prompts, luban.Sampling(max_tokens=10, temperature=0, ignore_eos=True))
    for prompt, result in zip(prompts, results, strict=True):
        tokens = torch.tensor([prompt])
        for token in result.token_ids:
            logits = theirs(tokens).logits[0, -1]
            assert logits[token] >= logits.max() - 1e-3
            tokens = torch.cat((tokens, torch.tensor([[token]])), dim=1)


def test_exported_model_loads_in_transformers_with_equal_logits(pair, tmp_path):
    theirs, ours = pair
    luban.export_model(ours, tmp_path / "out")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(back) is type(theirs) or theirs.config.model_type == "phi3"  # without partial rotation it is a LLaMA
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokens = torch.randint(0, ours.spec.vocab_size, (2, 11))
    torch.testing.assert_close(back(tokens).logits, theirs(tokens).logits, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act = 'silu'"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("phi3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}}, "longrope"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "longrope"),
    ],
)
def test_what_is_not_built_is_refused_by_name(kind, changes, message):
    config = random_config(random.Random(1), kind).to_dict()
    with pytest.raises(UnsupportedError, match=message):
        FORMATS[kind]().spec({**config, **changes})
