"""Fields of config.json that no format reads: silent where they change nothing, listed where that isn't known, refused where
they are known to change the computation; rotary scaling said twice, as transformers reads it."""

from __future__ import annotations

import json

import pytest
import torch

import luban
from luban.core.errors import UnsupportedError
from luban.core.log import _warned

transformers = pytest.importorskip("transformers")
BASE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**BASE, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
SMALL = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "BertForMaskedLM": {**BASE, "intermediate_size": 48},
    "RobertaForSequenceClassification": {**BASE, "intermediate_size": 48},
    "AlbertForMaskedLM": {**BASE, "intermediate_size": 48, "embedding_size": 16},
    "BartForConditionalGeneration": {
        "vocab_size": 64,
        "d_model": 32,
        **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
    },
    "T5ForConditionalGeneration": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 40,
        "num_layers": 1,
        "num_heads": 4,
    },
    "GPT2LMHeadModel": {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2},
    "OpenAIGPTLMHeadModel": {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2},
    "BloomForCausalLM": {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 2},
    "FalconForCausalLM": BASE,
}


def saved(folder, name="LlamaForCausalLM", **changes):
    """A directory of a small model of that class, with these fields of config.json changed."""
    kind = getattr(transformers, name)
    kind(kind.config_class(**SMALL[name], initializer_range=0.2)).eval().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize("name", SMALL)
def test_what_transformers_writes_is_read_or_known_to_be_harmless(name, tmp_path, capsys):
    _warned.clear()
    assert luban.load_model(saved(tmp_path / "m", name)).unread == ()
    assert "not read" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"num_local_experts": 8}, "num_local_experts = 8"),
        (
            {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_scaling.partial_rotary_factor",
        ),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling.factor = 4.0 without a rope_type"),
    ],
)
def test_fields_that_change_the_computation_are_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UnsupportedError, match=message):
        luban.load_model(saved(tmp_path / "m", **changes))


def test_other_fields_are_listed_by_name_with_their_values(tmp_path, capsys):
    _warned.clear()
    harmless = {"logit_scale": 1.0, "num_local_experts": None, "use_cache": False, "resid_dropout": 0.3, "top_h": None}
    changes = {
        **harmless,
        "attention_temperature": 2,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0, "depth": 3},
    }
    m = luban.load_model(saved(tmp_path / "m", **changes))
    assert [field.partition(" = ")[0] for field in m.unread] == [
        "rope_parameters",  # rope_scaling counts
        "attention_temperature",
        "rope_scaling.depth",
    ]
    said = capsys.readouterr().err
    assert "attention_temperature = 2" in said and "rope_scaling.depth = 3" in said and "top_h" not in said


@pytest.mark.parametrize("theta", [None, 500.0])
def test_rotary_scaling_said_twice_is_read_as_transformers_does(theta, tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0} | ({} if theta is None else {"rope_theta": theta})
    saved(tmp_path / "m", rope_scaling=scaling, rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    tokens = torch.randint(3, 60, (1, 200))
    torch.testing.assert_close(
        luban.load_model(tmp_path / "m").module(tokens), theirs(tokens).logits, atol=1e-4, rtol=0
    )
