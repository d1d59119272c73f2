"""`luban generate`, `chat`, `export` and `import` through the real command line."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(*words, stdin=""):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "luban", *map(str, words)], input=stdin, capture_output=True,
                          text=True, env=environment, timeout=120)  # fmt: skip


def test_generate_repeats_with_a_seed(tiny_checkpoint):
    words = ("generate", tiny_checkpoint, "hi", "--max-tokens", 12, "--seed", 7)
    first, second = run(*words), run(*words[:2], "-", *words[3:], stdin="hi")
    assert first.returncode == 0 and first.stdout.strip() and first.stdout == second.stdout


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


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("generate", "/nowhere", "x"), 1, "does not exist"),
        (("generate", "MODEL", "x" * 700), 1, "shorten the prompt"),
        (("generate", "MODEL", "x", "--temperature", "-1"), 2, "temperature must be"),
        (("generate", "MODEL"), 2, "PROMPT"),
        (("serve", "MODEL", "--port", "banana"), 2, "banana"),
        (("generate", "MODEL", "x", "--dtype", "float8"), 2, "unknown precision"),
    ],
)
def test_mistakes_get_one_line(tiny_checkpoint, words, code, message):
    done = run(*(tiny_checkpoint if word == "MODEL" else word for word in words))
    assert done.returncode == code and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout
