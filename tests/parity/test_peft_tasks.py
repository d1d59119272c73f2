"""Adapters of PEFT's that hold more than adapters, both ways: the heads of its tasks, and trained biases."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luban.adapters.base import AdapterConfig
from luban.adapters.ia3 import IA3
from luban.adapters.lora import LoRA
from luban.adapters.prefix import PTuningV2
from luban.adapters.prompt import PromptTuning
from luban.checkpoint.weights import weights_hash
from luban.core.errors import ArtifactError, UnsupportedError
from luban.load.adapted import ActiveAdapter, put_in, under_head
from luban.load.adapter_export import export_adapter, merged
from luban.load.export import export_model
from luban.load.model import LoadedModel, load_model
from luban.models.build import build_model, state_of
from luban.models.head.rows import Classes, Value
from luban.models.head.tokens import Span, TokenClasses
from luban.serve.adapters import AdapterPool

peft = pytest.importorskip("peft", reason="compares with Hugging Face's PEFT (extra test)")
transformers = pytest.importorskip("transformers", reason="PEFT adapts models of transformers (extra test)")

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BASES = {
    "llama": transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, pad_token_id=0
    ),
    "tied llama": transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ),
}
AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Language models on disk, by name."""
    made: dict[str, Path] = {}

    def base(name: str) -> Path:
        if name not in made:
            torch.manual_seed(random.SystemRandom().randrange(2**31))
            made[name] = tmp_path_factory.mktemp("base")
            model = transformers.AutoModelForCausalLM.from_config(BASES[name])
            moved(model)
            model.save_pretrained(made[name])
        return made[name]

    return base


def moved(module):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def theirs(folder: Path, task: str = "CAUSAL_LM", labels: int = 2):
    kept = {} if task in ("CAUSAL_LM", "QUESTION_ANS") else {"num_labels": labels}
    return AUTO[task].from_pretrained(folder, dtype=torch.float32, **kept).eval()


def outputs(model, x):
    """What their model gives, as ours does."""
    found = model(x)
    if "start_logits" in found:
        return torch.stack([found.start_logits, found.end_logits], -1)
    return found.logits.squeeze(-1) if found.logits.shape[1:] == (1,) else found.logits


def tokens():
    return torch.randint(1, 67, (3, 9))


def adapted(folder: Path, config: AdapterConfig, head=None) -> LoadedModel:
    """A model of ours with an adapter, and a new head trained with it; all that is trained has random values."""
    m = load_model(folder)
    base = weights_hash(state_of(m.module))
    if head is not None:
        m, drawn = under_head(m, replace(m.spec, head=head))
        new = dict.fromkeys(name.rpartition(".")[0] for name in sorted(drawn))
        config = replace(config, modules_to_save=(*config.modules_to_save, *new))
    weights = state_of(m.module)
    config.adapt(twin := build_model(m.spec, device="meta"))
    saved = {n: weights[n] for n, p in twin.named_parameters() if p.requires_grad and n in weights}
    put_in(m.module, config, config.initial(m.spec, weights, 1) | saved, "test")
    moved(m.module)
    return replace(m, adapter=ActiveAdapter(config, str(folder), base))


ROWS = {
    "reward": ("SEQ_CLS", Value(bias=False), 1),
    "classes": ("SEQ_CLS", Classes(count=3, pooling="last", dense=False, bias=False), 3),
    "classes of tokens": ("TOKEN_CLS", TokenClasses(count=3), 3),
}
KINDS = {
    "lora": LoRA(rank=3, alpha=5.0),
    "ia3": IA3(),
    "embedding": LoRA(rank=2, targets=("q",), modules_to_save=("embedding",)),
    "prefix": PTuningV2(length=3),
}


@pytest.mark.parametrize(
    ("name", "head", "kind"),
    [
        *(("llama", head, kind) for head in ROWS for kind in KINDS),
        *((name, "reward", kind) for name in ("tied llama", "gpt2") for kind in KINDS),
        ("gpt2", "classes of tokens", "lora"),
    ],
)
def test_a_head_of_ours_goes_to_peft_and_back(name, head, kind, bases, tmp_path):
    """Under PEFT's class of the task, whose own head begins at random; read again, over the language model."""
    task, ours, labels = ROWS[head]
    folder, x = bases(name), tokens()
    m = adapted(folder, KINDS[kind], ours)
    with torch.no_grad():
        wanted = m.module(x)
        export_adapter(m, tmp_path / "adapter")
        said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert said["task_type"] == task and (said["modules_to_save"] or []) != []
        their_model = peft.PeftModel.from_pretrained(theirs(folder, task, labels), tmp_path / "adapter").eval()
        got = outputs(their_model, x)
        torch.testing.assert_close(got[:, -9:] if got.dim() == 3 else got, wanted, rtol=1e-4, atol=1e-4)
        again = load_model(folder, adapter=tmp_path / "adapter")
        assert again.spec.head == ours
        torch.testing.assert_close(again.module(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS"),
        lambda: peft.LoraConfig(r=3, use_dora=True, target_modules="all-linear", task_type="SEQ_CLS"),
        lambda: peft.IA3Config(task_type="SEQ_CLS"),
        lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "c_attn"], task_type="TOKEN_CLS"),
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    ],
)
@pytest.mark.parametrize(("name", "labels"), [("llama", 1), ("tied llama", 3), ("gpt2", 1)])
def test_a_head_of_peft_is_read(name, labels, config, bases, tmp_path):
    folder, given = bases(name), config()
    model = peft.get_peft_model(theirs(folder, given.task_type, labels), given)
    moved(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        m, x = load_model(folder, adapter=tmp_path / "adapter"), tokens()
        got = outputs(model, x)
        torch.testing.assert_close(m.module(x), got[:, -9:] if got.dim() == 3 else got, rtol=1e-4, atol=1e-4)
        if given.peft_type in ("LORA", "IA3") and given.task_type == "SEQ_CLS":
            export_model(merged(m), tmp_path / "merged")
            whole = AUTO["SEQ_CLS"].from_pretrained(tmp_path / "merged", dtype=torch.float32, pad_token_id=0).eval()
            torch.testing.assert_close(outputs(whole, x), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_of_a_model_that_has_the_head(name, tmp_path):
    """Answers' spans: transformers reads no language model for them. From PEFT, and back to it."""
    folder, x = tmp_path / "base", tokens()
    AUTO["QUESTION_ANS"].from_config(BASES[name]).save_pretrained(folder)
    given = peft.LoraConfig(r=3, target_modules=["q_proj", "c_attn"], task_type="QUESTION_ANS")
    model = peft.get_peft_model(theirs(folder, "QUESTION_ANS"), given)
    moved(model)
    model.eval().save_pretrained(tmp_path / "a")
    with torch.no_grad():
        wanted, m = outputs(model, x), load_model(folder, adapter=tmp_path / "a")
        assert m.spec.head == Span()
        torch.testing.assert_close(m.module(x), wanted, rtol=1e-4, atol=1e-4)
        export_adapter(m, tmp_path / "b")
        again = peft.PeftModel.from_pretrained(theirs(folder, "QUESTION_ANS"), tmp_path / "b").eval()
        torch.testing.assert_close(outputs(again, x), wanted, rtol=1e-4, atol=1e-4)


def test_a_prompt_under_a_head_of_ours_goes_to_peft(bases, tmp_path):
    m, x = adapted(bases("llama"), PromptTuning(length=3), Value(bias=False)), tokens()
    export_adapter(m, tmp_path / "adapter")
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(theirs(bases("llama"), "SEQ_CLS", 1), tmp_path / "adapter").eval()
        torch.testing.assert_close(outputs(model, x), m.module(x), rtol=1e-4, atol=1e-4)


def test_a_head_that_can_not_be_is_refused(bases, tmp_path):
    """Its weights lost; served by name over a language model; with a bias, which transformers' has not."""
    folder = bases("llama")
    m = adapted(folder, LoRA(rank=2), Value(bias=False))
    export_adapter(m, tmp_path / "a")
    with pytest.raises(UnsupportedError, match=r"the adapter a has a head of its own, value, .*load it alone"):
        AdapterPool(load_model(folder), {"a": tmp_path / "a"}).start(8)
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "score" not in name}, file)
    with pytest.raises(ArtifactError, match=r"task_type is SEQ_CLS, .* lacks the tensor score.weight of its head"):
        load_model(folder, adapter=tmp_path / "a")
    biased = replace(adapted(folder, LoRA(rank=2), Value()), path=tmp_path)
    with pytest.raises(UnsupportedError, match=r"its head has bias = True instead of False"):
        export_adapter(biased, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "c_attn"]])
@pytest.mark.parametrize("name", ["llama", "gpt2", "tied llama"])
def test_biases_of_peft_are_read_and_written(name, targets, bias, bases, tmp_path):
    """Read, written again, read by PEFT; merged."""
    folder, x = bases(name), tokens()
    given = peft.LoraConfig(r=3, target_modules=targets, bias=bias, task_type="CAUSAL_LM")
    model = peft.get_peft_model(theirs(folder), given)
    moved(model)
    model.eval().save_pretrained(tmp_path / "a")
    with torch.no_grad():
        wanted = model(x).logits
        m = load_model(folder, adapter=tmp_path / "a")
        torch.testing.assert_close(m.module(x), wanted, rtol=1e-4, atol=1e-4)
        trained = {n for n, p in m.module.named_parameters() if p.requires_grad and ".adapters." not in n}
        assert all(each.endswith(".bias") for each in trained) and bool(trained) == (name != "tied llama")
        export_adapter(m, tmp_path / "b")
        said = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert (said["bias"] == "none") is not bool(trained) and said["modules_to_save"] is None
        again = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "b").eval()
        torch.testing.assert_close(again(x).logits, wanted, rtol=1e-4, atol=1e-4)
        export_model(merged(m), tmp_path / "merged")
        torch.testing.assert_close(theirs(tmp_path / "merged")(x).logits, wanted, rtol=1e-4, atol=1e-4)


def test_biases_of_ours_go_to_peft(bases, tmp_path):
    for number, targets in enumerate((("q", "k", "v", "o"), ("q",))):
        m, x = adapted(bases("llama"), LoRA(rank=2, targets=targets, modules_to_save=("bias",))), tokens()
        export_adapter(m, tmp_path / str(number))
        with torch.no_grad():
            model = peft.PeftModel.from_pretrained(theirs(bases("llama")), tmp_path / str(number)).eval()
            torch.testing.assert_close(model(x).logits, m.module(x), rtol=1e-4, atol=1e-4)


def test_biases_that_were_lost_and_modules_that_are_both_are_refused(bases, tmp_path):
    folder = bases("llama")
    given = peft.LoraConfig(r=3, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM")
    peft.get_peft_model(theirs(folder), given).save_pretrained(tmp_path / "a")
    file, said = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    whole = load_file(file)
    save_file({name: t for name, t in whole.items() if "bias" not in name}, file)
    with pytest.raises(
        ArtifactError, match=r"'lora_only', and .* lacks .*0.self_attn.q_proj.base_layer.bias, which was"
    ):
        load_model(folder, adapter=tmp_path / "a")
    said.write_text(json.dumps(json.loads(said.read_text()) | {"bias": "some"}))
    with pytest.raises(ArtifactError, match=r"bias = 'some': one of none, lora_only, all is needed"):
        load_model(folder, adapter=tmp_path / "a")
    both = adapted(folder, LoRA(rank=2, targets=("q", "v"), modules_to_save=("*.0.mixer.qkv.v",)))
    with pytest.raises(UnsupportedError, match=r"layers.0.self_attn.v_proj is both"):
        export_adapter(both, tmp_path / "b")
    with pytest.raises(UnsupportedError, match=r"PEFT saves no biases beside \(IA\)³"):
        export_adapter(adapted(folder, IA3(modules_to_save=("bias",))), tmp_path / "c")
    assert not (tmp_path / "b").exists() and not (tmp_path / "c").exists()
