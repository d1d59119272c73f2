"""`luban corpus`: help names what there is, options do what they say, and refusals say what to change in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from luban.cli.main import main
from luban.core.artifact import read_manifest
from luban.corpus.reader import read_corpus
from luban.corpus.sources import SOURCES
from luban.corpus.steps import STEPS


def refused(capsys, *words: str) -> str:
    """The one line with which a command is refused."""
    assert main(list(words)) != 0
    error = capsys.readouterr().err.strip()
    assert error.startswith("luban: ") and "Traceback" not in error
    return error.splitlines()[-1]


def test_help_lists_steps_and_kinds_of_sources(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["corpus", "build", "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for names in (STEPS, SOURCES):
        assert all(f"{name}," in shown or f", {name}" in shown for name in names)
    assert "--text-field" in shown


def test_help_shows_a_mixtures_fields_and_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["corpus", "mix", "--help"])
    page = capsys.readouterr().out
    assert "[[part]]" in page and all(f"\n  {name} " in page for name in ("path", "weight", "epochs", "name"))


def test_a_text_field_and_steps_with_spaces(tmp_path, capsys):
    rows = [{"content": "one"}, {"content": "one"}, {"content": "two"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = str(tmp_path / "c")
    assert (
        main(
            [
                "corpus",
                "build",
                str(tmp_path / "a.jsonl"),
                "--out",
                out,
                "--heldout",
                "0",
                "--text-field",
                "content",
                "--steps",
                " unicode , exact ",
            ]
        )
        == 0
    )
    assert [d.text for d in read_corpus(out)] == ["one", "two"]
    config = read_manifest(out).config
    assert config["text_field"] == "content" and [row["step"] for row in read_manifest(out).figures["waterfall"]] == [
        "read",
        "unicode",
        "exact",
    ]


def test_an_unknown_text_field_names_those_that_there_are(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"content": "one", "n": 1}')
    line = refused(capsys, "corpus", "build", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "c"))
    assert "'text' or 'messages', only content, n; --text-field NAME takes another field" in line
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": null}')
    assert "holds no line with text" in refused(
        capsys, "corpus", "build", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c")
    )


def test_a_build_of_which_nothing_is_left_says_which_step_took_it(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"text {i % 2}", "lang": "fr"}) for i in range(5)))
    line = refused(
        capsys,
        "corpus",
        "build",
        str(tmp_path / "a.jsonl"),
        "--out",
        str(tmp_path / "c"),
        "--steps",
        "exact,language=en",
    )
    assert "documents 5 after read, 2 after exact, 0 after language=en (dropped: 3 by exact, 2 by language: fr)" in line
    (tmp_path / "b.jsonl").write_text('{"text": "alone"}')
    line = refused(
        capsys, "corpus", "build", str(tmp_path / "b.jsonl"), "--out", str(tmp_path / "c"), "--heldout", "0.999999"
    )
    assert "the held-out split took all 1 documents; --heldout 0" in line


@pytest.mark.parametrize(
    "options, words",
    [
        (["--heldout", "nan"], "heldout: a fraction"),
        (["--bad-share", "-1"], "bad_share: a fraction from 0 to 1"),
        (["--bad-share", "nan"], "bad_share"),
        (["--workers", "0"], "workers: at least 1"),
        (["--workers", "-2"], "workers: at least 1"),
        (["--on", "mars"], "unknown executor 'mars'"),
        (["--steps", "exat"], "did you mean 'exact'"),
        (["--licence", "b.txt=MIT"], "no source is called 'b.txt' (did you mean 'a.txt'?)"),
        (["--licence", "="], "licence of all sources is empty"),
        (["--text-field", ""], "text_field"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, capsys, options, words):
    (tmp_path / "a.txt").write_text("text")
    assert words in refused(capsys, "corpus", "build", str(tmp_path / "a.txt"), "--out", str(tmp_path / "c"), *options)
    assert not (tmp_path / "c").exists()


def test_mixtures_that_cannot_be_are_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("text")
    assert main(["corpus", "build", str(tmp_path / "a.txt"), "--out", str(tmp_path / "a"), "--heldout", "0"]) == 0
    capsys.readouterr()
    recipe = tmp_path / "m.toml"
    mix = ["corpus", "mix", str(recipe), "--parts", str(tmp_path), "--out", str(tmp_path / "m")]
    recipe.write_text('[[part]]\nname = "a"\npath = "a"\nweight = 1\n')
    for size in ("-5", "-1"):
        assert f"is a number of bytes, or 0 for as many as there are; {size} given" in refused(
            capsys, *mix, "--bytes", size
        )
    for field in (
        "weight = nan",
        "weight = inf",
        'weight = "1"',
        "weight = true",
        "weight = -1",
        "weight = 1\nepochs = inf",
    ):
        recipe.write_text(f'[[part]]\nname = "a"\npath = "a"\n{field}\n')
        assert "must be a number above 0" in refused(capsys, *mix)
    assert not (tmp_path / "m").exists()


def test_paths_that_are_no_utf8_are_read_and_refused_as_output(tmp_path, capsys):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    with open(name + ".txt", "w") as file:
        file.write("text")
    assert main(["corpus", "build", name + ".txt", "--out", str(tmp_path / "c"), "--heldout", "0"]) == 0
    capsys.readouterr()
    assert "is no path in UTF-8: choose another --out" in refused(
        capsys, "corpus", "build", name + ".txt", "--out", name
    )
    with open(name + ".parquet", "w") as file:
        file.write("no Parquet")
    command = [sys.executable, "-m", "luban", "corpus", "build", name + ".parquet", "--out", str(tmp_path / "d")]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 1 and shown.stderr.startswith("luban: ") and "is not a Parquet file" in shown.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["c"]
