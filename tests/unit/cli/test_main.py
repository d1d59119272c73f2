"""The command line: fast to start, and every refusal one line with an exit code that means something."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from luban.cli.main import VERBS, main
from luban.core.artifact import ArtifactWriter, as_parent, read_manifest
from luban.core.ledger import load_ledger


def luban(*words, **options):
    return subprocess.run([sys.executable, "-m", "luban", *words], capture_output=True, text=True, **options)


def test_help_imports_next_to_nothing_and_names_every_verb():
    """Its time is that of its imports: 70 modules of Python itself take 30 ms, torch alone brings a thousand."""
    code = "import sys; from luban.cli.main import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0 and all(verb in shown.stdout for verb in VERBS)
    imported = shown.stderr.split()
    bare = subprocess.run([sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True)
    assert len(set(imported) - set(bare.stdout.split())) < 80
    own = {name.partition(".")[0] for name in imported} - set(bare.stdout.split())
    assert own - sys.stdlib_module_names == {"luban"}


def test_importing_luban_pulls_in_no_torch():
    code = "import sys, luban; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("verb", VERBS)
def test_a_python_without_the_dependencies_gets_the_pip_command(verb):
    """-S: the interpreter without its site-packages, as a system's Python is outside of a virtual environment."""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "luban", verb, "x", "--out", "y"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"luban: the package '\w+', which Luban needs, is not installed for .*\n", done.stderr), (
        done.stderr
    )
    command = f"{shlex.quote(sys.executable)} -m pip install --editable {shlex.quote(str(root))}\n"
    assert done.stderr.endswith(command)


def test_a_missing_module_of_our_own_is_no_missing_package(monkeypatch):
    def broken(words):
        raise ModuleNotFoundError("No module named 'luban.nothing'", name="luban.nothing")

    monkeypatch.setattr("luban.cli.main._run", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["doctor"])


def test_an_older_python_is_named(monkeypatch, capsys):
    monkeypatch.setattr("luban.cli.main.OLDEST", (99, 0))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().err.startswith("luban: Python 99.0 or newer is needed, ")


def test_unknown_verbs_and_options_are_one_line(capsys):
    for words, hint in ((["pretain"], "did you mean 'pretrain'"), (["systems", "--grop", "A"], "--grop")):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("luban: ") and hint in error


def pages(words, capsys):
    """(words, the page of help) of a verb and of the verbs below it."""
    try:
        code = main([*words, "--help"])
    except SystemExit as stop:
        code = stop.code
    page = capsys.readouterr().out
    assert not code, words
    yield words, page
    below = re.match(r"usage: luban [\w ]+? ([\w-]+(?:\|[\w-]+)+) …", page)
    for name in below[1].split("|") if below else ():
        yield from pages([*words, name], capsys)
    for line in re.findall(rf"luban {' '.join(words)} (ladder|emergence) ", page) if words == ["scaling"] else ():
        yield from pages([*words, line], capsys)


def test_every_option_of_every_verb_says_what_it_is(capsys):
    seen = 0
    for verb in VERBS:
        for words, page in pages([verb], capsys):
            assert page.startswith(f"usage: luban {' '.join(words)} "), words
            boxes = re.search(r"(?:positional arguments|\n.? options) .*", page, re.DOTALL)  # recipes' pages have none
            plain = re.sub(r"[│╭╮╰╯─]|-{9,}", " ", boxes[0] if boxes else "")
            for entry in re.split(r"\n(?= {0,2}\S)", "\n".join(line.rstrip() for line in plain.splitlines())):
                name, *text = re.split(r" {2,}|\n", entry.strip(), maxsplit=1)
                if re.match(r"--|[A-Z[]\S*$", name):
                    said = re.sub(r"\((default: \S*|required|repeatable)\)", "", " ".join(text))
                    assert re.search(r"[a-z]{2}", said), f"luban {' '.join(words)}: {name} has no word of help"
                    assert name not in ("STR", "PATH"), f"luban {' '.join(words)}: an argument is called by its type"
                    seen += 1
    assert seen > 200


def test_inspect(tmp_path, capsys):
    with ArtifactWriter(tmp_path / "a", kind="thing", config={"n": 1}, seed=3) as art:
        (art.path / "x").write_bytes(b"1")
        art.note(weights_hash="w" * 64)
    assert main(["inspect", str(tmp_path / "a"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "thing" and len(shown["content_hash"]) == 64 and shown["weights_hash"] == "w" * 64
    assert main(["inspect", str(tmp_path / "a"), "--verify"]) == 0
    assert "verified" in capsys.readouterr().out
    (tmp_path / "a" / "x").write_bytes(b"2")
    assert main(["inspect", str(tmp_path / "a"), "--verify"]) == 1
    assert "x" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nothing")]) == 1


def test_inspect_shows_settings_and_follows_an_ancestor_of_several_once(tmp_path, capsys):
    def make(name, *parents, **settings):
        with ArtifactWriter(tmp_path / name, kind="thing", parents=parents, settings=settings) as art:
            (art.path / "x").write_text(name)
        return as_parent(name, tmp_path / name)

    root = make("root")
    corpus = make("corpus", root)
    make("child", make("tokenizer", corpus), make("shards", corpus), log_every=7)
    assert main(["inspect", str(tmp_path / "child")]) == 0
    shown = capsys.readouterr().out
    assert "  settings\n    log_every                7\n" in shown
    assert shown.count("root (thing") == 1 and len(re.findall(r"corpus \(thing \w+\), as above\n", shown)) == 1
    before = read_manifest(tmp_path / "child")
    assert before.compute_hash() == replace(before, settings={"log_every": 8}).compute_hash()


def test_the_ledger_is_whole_and_every_path_in_it_exists(capsys):
    root = Path(__file__).parents[3]
    rows = load_ledger()
    sizes = {"A": 10, "B": 23, "C": 16, "D": 21, "E": 12, "F": 6, "G": 21, "H": 9, "I": 4, "J": 8}
    assert [r.id for r in rows] == [f"{g}{n}" for g, size in sizes.items() for n in range(1, size + 1)]
    for row in rows:
        for path in (row.module, row.test):
            assert not path or (root / path).exists(), f"{row.id} names {path}, which does not exist"
        assert not row.measured or row.hardware, f"{row.id} has a figure without its hardware"
    assert main(["systems"]) == 0
    part = sum(bool(row.module and row.test and row.missing) for row in rows)
    assert f"{len(rows)} rows" in (shown := capsys.readouterr().out) and f"{part} in part" in shown


@pytest.mark.parametrize("words", [["--help"], ["--version"], []])
def test_an_overview_that_nobody_reads_to_its_end_is_no_traceback(words):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [
            sys.executable,
            "-u",
            "-m",
            "luban",
            *words,
        ]  # unbuffered: the first write fails, as that of a long text
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize(
    ("words", "said", "unsaid"),
    [
        (["sft", "luban_lora_cpu"], ["Fields, as luban_lora_cpu has them:", "luban_sft_gpu"], ["luban_dpo_cpu"]),
        (
            ["sft", "luban_lora_cpu", "--adapter.type", "prompt"],
            ["--adapter.length", "default prompt]"],
            ["--adapter.rank"],
        ),
        (["pretrain", "tiny_pretrain_cpu"], ["optimizer steps [int, default 100]"], ["luban_lora_cpu"]),
        (
            ["pretrain", "tiny_pretrain_cpu", "--model.layer.mixer.type", "lsh", "--model.layers", "3"],
            [
                "--model.layer.mixer.eval_rounds",
                "H [int, default 4]",
                "stream [int, default 64]",
                "repeated [int, default 3]",
            ],
            ["mixer.kv_heads"],
        ),
        (
            ["pretrain", "tiny_pretrain_cpu", "--model.layer.mixer.layout.type", "local"],
            ["--model.layer.mixer.layout.block", "none, default local]"],
            ["mixer.span"],
        ),
        (["pretrain", "tiny_pretrain_cpu", "--model.preset", "tinny"], ["--model.width"], ["stream [int, default 64]"]),
        (["pretrain"], ["optimizer steps [int, default 1000]", "transformer_translation_cpu"], ["minilm_dpr_cpu"]),
    ],
)
def test_help_of_a_recipe_has_its_values_and_lists_the_verbs_recipes(words, said, unsaid, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    shown = capsys.readouterr().out
    assert all(text in shown for text in said) and not any(text in shown for text in unsaid)


def test_values_of_a_field_apart_from_it_are_told_from_recipes(capsys):
    assert main(["sft", "luban_lora_cpu", "--adapter.targets", "q", "v", "--out", "run"]) == 2
    said = capsys.readouterr().err
    assert "takes one recipe (2 given: luban_lora_cpu, v): values of one field are separated by commas" in said
