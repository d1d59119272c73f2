"""generation_config.json: what of it is followed, what is named as not followed, and that neither is lost on the way."""

from __future__ import annotations

import json
import random

import pytest
import torch

import luban
import luban.core.log
from luban.core.errors import ArtifactError
from luban.load.export import import_model
from luban.load.generation import Generation, read_generation


def written(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def reading(folder, config=None, *, context=100, two_sided=False):
    return read_generation(folder, config or {}, context=context, two_sided=two_sided)


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20},
        ),
        ({"do_sample": True, "min_p": 0.1, "temperature": None}, {"min_p": 0.1}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),  # nothing is drawn there without do_sample
        ({"repetition_penalty": 1.1, "max_new_tokens": 7}, {"repetition_penalty": 1.1, "max_tokens": 7}),
        ({"stop_strings": ["\n\n", "User:"]}, {"stop": ["\n\n", "User:"]}),
        ({"max_length": 50, "transformers_version": "5", "chat_format": "chatml"}, {}),
    ],
)
def test_what_is_followed(tmp_path, fields, sampling):
    assert reading(written(tmp_path, **fields)).sampling == sampling


def test_asked_for_before_set_before_usual():
    makers = Generation(sampling={"temperature": 0.6, "top_p": 0.9, "max_tokens": 5})
    made = makers.sample({"temperature": 0.0, "top_p": None, "seed": None}, top_p=0.1, top_k=3, max_tokens=99)
    assert made == luban.Sampling(temperature=0.0, top_p=0.9, max_tokens=5, top_k=3)


def test_what_is_not_followed_is_named(tmp_path):
    fields = {
        "num_beams": 4,
        "no_repeat_ngram_size": 3,
        "min_length": 0,
        "length_penalty": 2.0,
        "typical_p": 1.0,
        "forced_eos_token_id": 2,
        "max_length": 60,
        "early_stopping": True,
        "suppress_tokens": [1, 2],
    }
    named = ("num_beams = 4", "no_repeat_ngram_size = 3", "forced_eos_token_id = 2", "suppress_tokens = [1, 2]")
    assert reading(written(tmp_path, **fields)).unbuilt == (*named, "max_length = 60")
    assert reading(tmp_path, context=60).unbuilt == named  # the context ends the text there anyway
    both = reading(tmp_path, two_sided=True)
    assert both.unbuilt == named and both.sampling == {"max_tokens": 59}  # behind the start token


def test_old_directories_say_it_in_the_models_configuration(tmp_path):
    old = {
        "do_sample": False,
        "top_k": 50,
        "temperature": 1.0,
        "max_length": 20,
        "num_beams": 4,
        "eos_token_id": [3, 4],
    }
    found = reading(tmp_path, old)
    assert found.sampling == {} and found.unbuilt == ("num_beams = 4",) and found.stop_ids == (3, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"do_sample": True, "temperature": -1}, "temperature must be"),
        ({"max_new_tokens": "many"}, "max_tokens must be a whole number"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, fields, message):
    with pytest.raises(ArtifactError, match=rf"generation_config\.json: .*{message}"):
        reading(written(tmp_path, **fields))


def test_it_survives_import_and_export(tiny_checkpoint, tmp_path, monkeypatch):
    luban.export_model(luban.load_model(tiny_checkpoint), tmp_path / "hf")
    written(tmp_path / "hf", eos_token_id=[1, 9], do_sample=True, temperature=0.5, max_new_tokens=3, num_beams=4)
    first = luban.load_model(tmp_path / "hf")
    assert set(first.stop_ids) >= {1, 9}
    import_model(first, tmp_path / "imported")
    luban.export_model(luban.load_model(tmp_path / "imported"), tmp_path / "again")
    said = []
    monkeypatch.setattr(luban.core.log, "say", said.append)
    monkeypatch.setattr(luban.core.log, "_warned", set())
    for folder in ("hf", "imported", "again"):
        m = luban.load_model(tmp_path / folder)
        assert set(m.stop_ids) == set(first.stop_ids) and m.generation.sampling == first.generation.sampling
        assert len(luban.Engine(m).generate([[20, 30]])[0].token_ids) <= 3
        luban.Engine(m)
    assert [line for line in said if "num_beams = 4" in line] == [
        f"warning: {name}: its authors ask for num_beams = 4 (generation_config.json), which isn't built, so its text may "
        "differ from what they get"
        for name in ("hf", "imported", "again")
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart"])
def test_a_penalty_on_repetition_equals_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed := random.SystemRandom().randrange(2**32))
    print(f"seed {seed}")
    sizes = {
        "llama": {
            "hidden_size": 24,
            "intermediate_size": 30,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "initializer_range": 0.4,
        },
        "gpt2": {"n_embd": 24, "n_layer": 2, "n_head": 3, "initializer_range": 0.4},
        "t5": {
            "d_model": 24,
            "d_kv": 8,
            "d_ff": 30,
            "num_layers": 2,
            "num_heads": 3,
            "initializer_factor": 3.0,
            "decoder_start_token_id": 0,
        },
        "bart": {
            "d_model": 24,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "encoder_attention_heads": 3,
            "decoder_attention_heads": 3,
            "encoder_ffn_dim": 30,
            "decoder_ffn_dim": 30,
            "init_std": 0.5,
            "forced_eos_token_id": None,
        },
    }[kind]
    config = transformers.AutoConfig.for_model(kind, vocab_size=53, eos_token_id=1, **sizes)
    two_sided = kind in ("t5", "bart")
    auto = transformers.AutoModelForSeq2SeqLM if two_sided else transformers.AutoModelForCausalLM
    theirs = auto.from_config(config).eval()
    theirs.generation_config.update(
        repetition_penalty=1.7, max_new_tokens=14, do_sample=False, eos_token_id=1, pad_token_id=2
    )
    theirs.save_pretrained(tmp_path)
    ours = luban.load_model(tmp_path)
    prompts = [torch.randint(3, 53, (n,)).tolist() for n in (5, 5)]
    want = theirs.generate(torch.tensor(prompts), attention_mask=torch.ones(2, 5, dtype=torch.long))
    for result, row in zip(luban.Engine(ours).generate(prompts), want.tolist(), strict=True):  # as the directory says
        answer = row[1:] if two_sided else row[5:]
        assert result.token_ids == (answer[: answer.index(1) + 1] if 1 in answer else answer)
