"""Adapters beside Hugging Face's PEFT: what Luban writes computes the same there, and what PEFT writes the same here."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from luban.adapters.dora import DoRA
from luban.adapters.ia3 import IA3
from luban.adapters.lora import LoRA
from luban.adapters.pissa import PiSSA
from luban.adapters.prefix import PrefixTuning
from luban.adapters.prompt import PromptTuning
from luban.checkpoint.weights import weights_hash
from luban.core.errors import ArtifactError, LineageError, UnsupportedError
from luban.load.adapted import ActiveAdapter, put_in
from luban.load.adapter_export import export_adapter, merged
from luban.load.export import export_model
from luban.load.model import load_model
from luban.models.build import build_model, state_of

peft = pytest.importorskip("peft", reason="compares with Hugging Face's PEFT (extra test)")
transformers = pytest.importorskip("transformers", reason="PEFT adapts models of transformers (extra test)")

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BASES = {
    "llama": lambda: transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=True
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "phi3": lambda: transformers.Phi3Config(
        **SIZES, num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64, pad_token_id=0
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=67, hidden_size=32, n_layer=2, n_head=4),
}
OURS = {
    "lora": LoRA(rank=3, alpha=5.0),
    "lora of queries and values": LoRA(rank=3, alpha=4.0, targets=("q", "v"), rank_stabilised=True),
    "lora of one layer": LoRA(rank=2, targets=("*.blocks.1.*",)),
    "lora with the embedding": LoRA(rank=2, targets=("up",), modules_to_save=("embedding",)),
    "lora with the norms": LoRA(rank=2, targets=("up",), modules_to_save=("norm",)),
    "lora with outputs and some values": LoRA(rank=2, targets=("up", "down"), modules_to_save=("o", "*.0.mixer.qkv.v")),
    "lora of the head": LoRA(rank=2, targets=("v", "lm_head")),  # tied to the embedding but for Phi-3's
    "pissa": PiSSA(rank=2, alpha=3.0),
    "dora": DoRA(rank=3, alpha=4.0),
    "ia3": IA3(),
    "prompt": PromptTuning(length=3),
    "prefix": PrefixTuning(length=3, network=16),
}
WITHOUT = {("bloom", "prompt"), ("bloom", "prefix")}  # biases by distance, which a prompt would lack


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(name):
        if name not in made:
            torch.manual_seed(random.SystemRandom().randrange(2**31))
            folder = tmp_path_factory.mktemp(name)
            model = transformers.AutoModelForCausalLM.from_config(BASES[name]())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            model.save_pretrained(folder)
            made[name] = folder
        return made[name]

    return base


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def moved(module):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def tokens():
    return torch.randint(1, 67, (2, 9))


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", BASES)
def test_what_is_exported_computes_the_same_in_peft_and_read_again(name, kind, bases, tmp_path):
    if (name, kind) in WITHOUT:
        pytest.skip("a model with ALiBi takes no prompt")
    folder, config = bases(name), OURS[kind]
    m = load_model(folder)
    weights = state_of(m.module)
    found = weights_hash(weights)
    config.adapt(twin := build_model(m.spec, device="meta"))
    saved = {n: weights[n] for n, p in twin.named_parameters() if p.requires_grad and n in weights}
    put_in(m.module, config, config.initial(m.spec, weights, 1) | saved, "test")
    moved(m.module)
    m = replace(m, adapter=ActiveAdapter(config, str(folder), found))
    x = tokens()
    with torch.no_grad():
        wanted, plain = m.module(x), theirs(folder)(x).logits
        assert (wanted - plain).abs().max() > 1e-2
        export_adapter(m, tmp_path / "adapter")
        got = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "adapter").eval()(x).logits[:, -9:]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        if kind != "prefix":
            again = load_model(folder, adapter=tmp_path / "adapter")
            torch.testing.assert_close(again.module(x), wanted, rtol=1e-4, atol=1e-4)
        if kind in ("lora", "lora of the head", "pissa", "dora", "ia3"):
            export_model(merged(m), tmp_path / "merged")
            torch.testing.assert_close(theirs(tmp_path / "merged")(x).logits, wanted, rtol=1e-4, atol=1e-4)


PEFTS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM"),
    "lora with ranks": lambda: peft.LoraConfig(
        r=2, target_modules="all-linear", rank_pattern={"layers.0.*": 3, "h.0.*": 3}, task_type="CAUSAL_LM"
    ),
    "lora of one layer": lambda: peft.LoraConfig(
        r=3, target_modules=["q_proj", "c_attn", "qkv_proj"], layers_to_transform=[1], task_type="CAUSAL_LM"
    ),
    "lora with norms": lambda: peft.LoraConfig(  # PEFT saves every module whose name ends so
        r=3, target_modules="all-linear", modules_to_save=["norm", "ln_1"], task_type="CAUSAL_LM"
    ),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", PEFTS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_what_peft_writes_computes_the_same_here(name, kind, bases, tmp_path):
    if kind == "ia3" and name == "phi3":
        pytest.skip("PEFT has no default targets for Phi-3")
    folder = bases(name)
    model = peft.get_peft_model(theirs(folder), PEFTS[kind]())
    moved(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    x = tokens()
    with torch.no_grad():
        m = load_model(folder, adapter=tmp_path / "adapter")
        torch.testing.assert_close(m.module(x), model(x).logits[:, -9:], rtol=1e-4, atol=1e-4)


def test_what_would_be_read_wrong_is_refused(bases, tmp_path):
    """An adapter of the embedding beside others; a first step that changed the base; a scale that is no number."""
    folder = bases("llama")

    def write(**settings):
        config = peft.LoraConfig(r=3, task_type="CAUSAL_LM", **settings)
        peft.get_peft_model(theirs(folder), config).save_pretrained(tmp_path / "a")

    write(target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(UnsupportedError, match=r"embed_tokens.lora_embedding_A, which isn.t read"):
        load_model(folder, adapter=tmp_path / "a")
    write(target_modules=["q_proj"], init_lora_weights="pissa")
    with pytest.raises(UnsupportedError, match="'pissa', which changed the weights of the base"):
        load_model(folder, adapter=tmp_path / "a")
    write(target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": "many"}))
    with pytest.raises(ArtifactError, match=r"lora_alpha = 'many' for .*q_proj: a number above 0"):
        load_model(folder, adapter=tmp_path / "a")


def test_other_kinds_are_named(bases, tmp_path):
    config = peft.LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(theirs(bases("llama")), config).save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedError, match=r"kind LOHA, which isn.t read \(known: IA3, LORA"):
        load_model(bases("llama"), adapter=tmp_path / "a")


def test_an_adapter_of_another_base_is_refused_with_both_hashes(bases, tmp_path):
    m = load_model(bases("llama"))
    weights, config = state_of(m.module), OURS["lora"]
    first = weights_hash(weights)
    put_in(m.module, config, config.initial(m.spec, weights, 1), "test")
    export_adapter(replace(m, adapter=ActiveAdapter(config, "base", first)), tmp_path / "a")
    other = load_model(bases("llama"))
    with torch.no_grad():
        other.module.decoder.blocks["1"].feedforward.down.weight[0, 0] += 1
    export_model(other, tmp_path / "other")
    with pytest.raises(LineageError, match=f"{first}.*{weights_hash(state_of(other.module))}"):
        load_model(tmp_path / "other", adapter=tmp_path / "a")
    with pytest.raises(ArtifactError, match="holds no adapter"):
        load_model(tmp_path / "other", adapter=tmp_path / "other")
