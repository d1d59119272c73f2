"""Random Mixtral and Qwen 3 mixtures of experts against transformers' own classes: logits, gradients, generation, round trip."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file

import luban
from luban.core.errors import UnsupportedError

transformers = pytest.importorskip("transformers")
KINDS = ("mixtral", "qwen3_moe")


def theirs_of(kind: str, rng: random.Random, **fields):
    """A small model of odd sizes."""
    kv_heads, experts = rng.choice([1, 2]), rng.choice([2, 3, 5])
    own = {"mixtral": {"sliding_window": rng.choice([None, 3])}, "qwen3_moe": {"norm_topk_prob": rng.random() < 0.5}}
    config = transformers.AutoConfig.for_model(
        kind,
        vocab_size=rng.randrange(31, 99, 2),
        hidden_size=24,
        intermediate_size=rng.randrange(9, 30),
        moe_intermediate_size=rng.randrange(9, 30),
        num_hidden_layers=rng.choice([1, 2]),
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=6,
        num_local_experts=experts,
        num_experts_per_tok=rng.randint(1, experts),
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=rng.random() < 0.5,
        **own[kind],
        **fields,
    )
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


@pytest.fixture(params=KINDS)
def pair(request, tmp_path):
    theirs = theirs_of(request.param, random.Random(), pad_token_id=0)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, luban.load_model(tmp_path / "theirs"), tmp_path


def test_logits_and_gradients_equal_transformers(pair):
    theirs, ours, _ = pair
    tokens = torch.randint(0, ours.spec.vocab_size, (3, 11))
    wanted, found = theirs(tokens).logits, ours.module(tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    wanted.square().sum().backward()
    found.square().sum().backward()
    router = theirs.model.layers[0].mlp.gate.weight.grad
    torch.testing.assert_close(
        ours.module.decoder.blocks["0"].feedforward.router.weight.grad, router, rtol=1e-3, atol=1e-2
    )


@pytest.mark.parametrize("paged", [True, False])
def test_generation_equals_transformers(pair, paged):
    theirs, ours, _ = pair
    prompt = torch.randint(0, ours.spec.vocab_size, (1, 5))
    seen = torch.ones_like(prompt)  # else `generate` takes a 0 in the prompt, drawn like any other token, for padding
    wanted = theirs.generate(prompt, attention_mask=seen, max_new_tokens=12, do_sample=False, eos_token_id=None)
    engine = luban.Engine(ours, paged=paged)
    results = engine.generate([prompt[0].tolist()], luban.Sampling(max_tokens=12, temperature=0.0, ignore_eos=True))
    assert list(results[0].token_ids) == wanted[0, 5:].tolist()


def test_an_export_holds_the_same_tensors(pair):
    theirs, ours, folder = pair
    luban.export_model(ours, folder / "back")
    before, after = (load_file(folder / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() - {"lm_head.weight"} == after.keys() - {"lm_head.weight"}
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items() if name in before)
    again = luban.load_model(folder / "back")
    assert again.spec == ours.spec
    loaded = type(theirs).from_pretrained(folder / "back", experts_implementation="eager")
    tokens = torch.randint(0, ours.spec.vocab_size, (2, 7))
    torch.testing.assert_close(loaded(tokens).logits, theirs(tokens).logits)


def test_dense_layers_in_between_are_refused(tmp_path):
    theirs_of("qwen3_moe", random.Random(), mlp_only_layers=[0]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="mlp_only_layers"):
        luban.load_model(tmp_path)
