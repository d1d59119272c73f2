"""Directories in forms that other writers give them: tied tables under one name, padding tokens without a row."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import luban
from luban.core.errors import ArtifactError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SIDES = {"vocab_size": 40, "d_model": 16}
TIED = {
    "LlamaForCausalLM": (SIZES, "model.embed_tokens.weight", ["lm_head.weight"]),
    "GPT2LMHeadModel": (
        {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2},
        "transformer.wte.weight",
        ["lm_head.weight"],
    ),
    "BertForMaskedLM": (SIZES, "bert.embeddings.word_embeddings.weight", ["cls.predictions.decoder.weight"]),
    "RobertaForMaskedLM": (SIZES, "roberta.embeddings.word_embeddings.weight", ["lm_head.decoder.weight"]),
    "T5ForConditionalGeneration": (
        {**SIDES, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        "shared.weight",
        ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
    ),
    "BartForConditionalGeneration": (
        {
            **SIDES,
            **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
        },
        "model.shared.weight",
        ["model.decoder.embed_tokens.weight"],
    ),
}


@pytest.mark.parametrize("kind", TIED)
def test_a_table_stored_under_another_of_its_names_is_found(kind, tmp_path):
    sizes, name, others = TIED[kind]
    cls = getattr(transformers, kind)
    theirs = cls(cls.config_class(**sizes, tie_word_embeddings=True)).eval()
    theirs.save_pretrained(tmp_path / "m")
    whole = luban.load_model(tmp_path / "m")
    tensors = load_file(tmp_path / "m/model.safetensors")
    table = tensors.pop(name)
    for other in others:
        tensors.pop(other, None)
    save_file({**tensors, **{other: table.clone() for other in others}}, tmp_path / "m/model.safetensors")
    found = dict(luban.load_model(tmp_path / "m").module.named_parameters())
    for ours, parameter in whole.module.named_parameters():
        assert torch.equal(found[ours], parameter), ours
    save_file(tensors, tmp_path / "m/model.safetensors")
    with pytest.raises(ArtifactError, match=f"lacks the tensor .*{name}"):
        luban.load_model(tmp_path / "m")


@pytest.mark.parametrize("activation", ["gated-silu", "gelu_new", "gelu"])
def test_t5_with_other_activations(activation, tmp_path):
    config = transformers.T5Config(**TIED["T5ForConditionalGeneration"][0], feed_forward_proj=activation)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "m")
    ours, tokens = luban.load_model(tmp_path / "m"), torch.randint(0, 40, (2, 7))
    want = theirs(input_ids=tokens, decoder_input_ids=tokens).logits
    torch.testing.assert_close(ours.module(tokens, tokens), want, atol=1e-4, rtol=0)
    luban.export_model(ours, tmp_path / "out")
    back = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(back(input_ids=tokens, decoder_input_ids=tokens).logits, want, atol=1e-5, rtol=0)


def with_tokenizer(folder, special: dict[str, str], added: list[str]):
    """A LLaMA of 40 tokens and a tokenizer of 39 letters with these special tokens, and others behind them."""
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    theirs.save_pretrained(folder)
    vocab = {"<s>": 0} | {chr(ord("a") + i): i + 1 for i in range(39)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", **special)
    made.add_tokens(added, special_tokens=True)
    made.save_pretrained(folder)
    return folder


def test_a_padding_token_without_a_row_is_left_unused(tmp_path):
    m = luban.load_model(with_tokenizer(tmp_path / "m", {"pad_token": "[PAD]"}, []))
    assert m.tokenizer.pad_id is None and m.spec.vocab_size == 40
    assert m.tokenizer.bos_id == 0 and m.tokenizer.encode("c") == [3]
    (result,) = luban.Engine(m).generate("c", luban.Sampling(max_tokens=3, seed=random.randrange(99)))
    assert max(result.token_ids) < 40


@pytest.mark.parametrize(
    ("special", "added", "named"),
    [
        ({"eos_token": "<end>"}, [], "<end>"),
        ({}, ["<image>"], "<image>"),
        ({"pad_token": "[PAD]"}, ["<image>"], "<image>"),
    ],
)
def test_other_tokens_without_a_row_are_refused_by_name(tmp_path, special, added, named):
    with pytest.raises(ArtifactError, match=f"vocabulary only 40: {named} has no row"):
        luban.load_model(with_tokenizer(tmp_path / "m", special, added))
