"""`luban generate`: what its flags ask of the engine, and what is refused before the model is read."""

from __future__ import annotations

import json

import pytest

import luban
from luban.cli.main import main
from luban.generate.sampling import Sampling


def generate(capsys, *words) -> str:
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_structures_from_files_and_flags(tiny_checkpoint, tmp_path, capsys):
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text(json.dumps({"enum": ["a", 1]}))
    (tmp_path / "rules.lark").write_text('start: "x" "y"?')
    words = (tiny_checkpoint, "hi", "--max-tokens", 50)
    assert json.loads(generate(capsys, *words, "--json-schema", tmp_path / "schema.json")) in ("a", 1)
    assert generate(capsys, *words, "--choice", "yes", "--choice", "no") in ("yes\n", "no\n")
    assert generate(capsys, *words, "--regex", "[ab]{3}").strip("ab") == "\n"
    assert generate(capsys, *words, "--grammar", tmp_path / "rules.lark") in ("x\n", "xy\n")


def test_beams_and_guesses_are_the_engines(tiny_checkpoint, capsys):
    engine = luban.Engine(luban.load_model(tiny_checkpoint))
    best = engine.generate("hi", Sampling(beams=3, n=2, max_tokens=6, length_penalty=0.5))[0]
    shown = generate(capsys, tiny_checkpoint, "hi", "--beams", 3, "--n", 2, "--max-tokens", 6, "--length-penalty", 0.5)
    assert shown == "".join(f"{choice.text}\n" for choice in best.choices)
    words = (tiny_checkpoint, "hi", "--max-tokens", 9, "--seed", 3)
    plain = generate(capsys, *words)
    assert generate(capsys, *words, "--draft", tiny_checkpoint) == plain
    assert generate(capsys, *words, "--speculative", "ngram") == plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--regex", "a", "--choice", "b"), "use one"),
        (("--json-schema", "nowhere.json"), "nowhere.json can't be read"),
        (("--beams", "0"), "beams must be"),
        (("--beams", "2", "--n", "3"), "n must be at most beams"),
        (("--speculative", "magic"), "speculative"),
    ],
)
def test_what_cannot_be_is_one_line(words, message, capsys):
    assert main(["generate", "no-such-model", "hi", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.strip().splitlines()) == 1
