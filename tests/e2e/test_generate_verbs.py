"""`luban generate`, `chat`, `export` and `import` through the real command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
import warm

import luban
from luban.models.head.hidden import Hidden
from luban.models.spec import changed


def run(*words, stdin=""):
    return warm.command(*words, input=stdin)


def test_generate_repeats_with_a_seed(tiny_checkpoint):
    words = ("generate", tiny_checkpoint, "hi", "--max-tokens", 12, "--seed", 7)
    first, second = run(*words), run(*words[:2], "-", *words[3:], stdin="hi")
    assert first.returncode == 0 and first.stdout.strip() and first.stdout == second.stdout


def test_two_processes_generate_what_one_does(tiny_checkpoint):
    words = ("generate", tiny_checkpoint, "hi", "--max-tokens", 12, "--seed", 7)
    alone, several = run(*words), run(*words, "--plan.tensor", 2)
    assert several.returncode == 0 and several.stdout == alone.stdout and not several.stderr
    refused = run(*words, "--plan.tensor", 5)
    assert refused.returncode == 2 and "use at most --plan.tensor 4" in refused.stderr


def test_chat_answers_each_line(tiny_checkpoint):
    done = run("chat", tiny_checkpoint, "--max-tokens", 8, "--seed", 1, stdin="hi\n/reset\nhi\n/quit\nnever\n")
    assert done.returncode == 0 and done.stderr.count("› hi") == 2
    half = len(done.stdout) // 2
    assert done.stdout.strip() and done.stdout[:half] == done.stdout[half:]  # forgetting made the second as the first


def test_export_and_import(tiny_checkpoint, tmp_path):
    assert run("export", tiny_checkpoint, "--out", tmp_path / "hf").returncode == 0
    assert run("import", tmp_path / "hf", "--out", tmp_path / "back").returncode == 0
    words = ("--max-tokens", 12, "--seed", 7)
    assert (
        run("generate", tmp_path / "back", "hi", *words).stdout == run("generate", tiny_checkpoint, "hi", *words).stdout
    )
    again = run("export", tiny_checkpoint, "--out", tmp_path / "hf")
    assert again.returncode == 1 and "already exists" in again.stderr


def test_an_encoder_decoder_answers_its_source(tiny_translator, tmp_path):
    words = ("--max-tokens", 12, "--temperature", 0)
    m = luban.load_model(tiny_translator)
    want = luban.Engine(m).generate("hello", luban.Sampling(max_tokens=12, temperature=0))[0].text
    done, piped = (
        run("generate", tiny_translator, "hello", *words),
        run("generate", tiny_translator, "-", *words, stdin="hello"),
    )
    assert done.returncode == 0 and done.stdout == piped.stdout == want + "\n" and want
    whole = luban.load_model(tiny_translator).module(
        torch.tensor([luban.Engine(m).tokens_of("hello")]), torch.tensor([[m.spec.body.decoder_start]])
    )  # without sessions and caches
    first = luban.Engine(m).generate("hello", luban.Sampling(max_tokens=1, temperature=0))[0].token_ids
    assert first == [int(whole[0, -1].argmax())]
    for refused in (run("chat", tiny_translator, stdin="hello\n"), run("generate", tiny_translator, "x" * 99)):
        assert refused.returncode == 1 and len(refused.stderr.strip().splitlines()) == 1 and not refused.stdout
    assert "has no chat template" in run("chat", tiny_translator, stdin="hello\n").stderr
    assert (
        "the source has 100 tokens, and the model reads 64 at most" in run("generate", tiny_translator, "x" * 99).stderr
    )


def test_makers_settings_hold_until_the_person_says_otherwise(tiny_checkpoint, tmp_path):
    model = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 5, "num_beams": 2}))
    plain, said = (
        run("generate", model, "hi"),
        run("generate", model, "hi", "--max-tokens", 9, "--temperature", 1, "--seed", 3),
    )
    m = luban.load_model(tiny_checkpoint)
    for done, sampling in (
        (plain, luban.Sampling(max_tokens=5, temperature=0)),
        (said, luban.Sampling(max_tokens=9, temperature=1, seed=3)),
    ):
        assert done.stdout == luban.Engine(m).generate("hi", sampling)[0].text + "\n"
        assert done.stderr.count("num_beams = 2") == 1
    chat = run("chat", model, stdin="hi\n/reset\nhi\n")
    half = len(chat.stdout) // 2
    assert chat.stdout[:half] == chat.stdout[half:] and chat.stderr.count("num_beams = 2") == 1  # greedy


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("generate", "/nowhere", "x"), 1, "does not exist"),
        (("generate", "MODEL", "x" * 700), 1, "shorten the prompt"),
        (("generate", "MODEL", "x", "--temperature", "-1"), 2, "temperature must be"),
        (("chat", "MODEL", "--repetition-penalty", "0"), 2, "repetition_penalty must be larger than 0"),
        (("generate", "MODEL"), 2, "PROMPT"),
        (("serve", "MODEL", "--port", "banana"), 2, "banana"),
        (("generate", "MODEL", "x", "--dtype", "float8"), 2, "unknown precision"),
    ],
)
def test_mistakes_get_one_line(tiny_checkpoint, words, code, message):
    done = run(*(tiny_checkpoint if word == "MODEL" else word for word in words))
    assert done.returncode == code and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout


def test_models_that_write_no_text_say_so_at_once(tiny_checkpoint, tmp_path):
    m = luban.load_model(tiny_checkpoint)
    spec = changed(m.spec, head=Hidden())
    luban.export_model(replace(m, spec=spec, module=luban.build_model(spec)), tmp_path / "body")
    for words in (
        ("generate", tmp_path / "body", "hi"),
        ("chat", tmp_path / "body"),
        ("serve", tmp_path / "body", "--port", "0"),
    ):
        done = run(*words, stdin="hi\n")
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.strip().splitlines() == [
            "luban: generating text needs a decoder with a language_model head; this model has body decoder and head hidden"
        ]
