"""Benchmarks that keep rows or take names: wrong names and rows of other settings are refused before anything is trained."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmark(name, *words)` loads a script and runs it with these words."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, *words, **replaced):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        for attribute, value in replaced.items():
            monkeypatch.setattr(module, attribute, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        module.main()

    return run


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 200)
    return path


@pytest.mark.parametrize("name", ["optimizers", "stability", "pathfinder"])
def test_a_row_that_is_not_there_is_refused_with_those_that_are(benchmark, text, capsys, name):
    data = [] if name == "pathfinder" else ["--data", text]
    with pytest.raises(SystemExit) as stop:
        benchmark(name, *data, "--only", "nothing")
    assert stop.value.code == 2 and "invalid choice: 'nothing' (choose from" in capsys.readouterr().err


def test_too_few_images_are_refused_before_they_are_drawn(benchmark, capsys):
    for words in (["--heldout", "4"], ["--images", "8", "--batch", "9"]):
        with pytest.raises(SystemExit):
            benchmark("pathfinder", *words)
        assert "--heldout must be at least 50 and --images at least --batch" in capsys.readouterr().err


def test_kept_runs_of_stability_are_taken_for_their_own_settings_alone(benchmark, text, tmp_path, capsys):
    out, trained = tmp_path / "runs.json", []

    def run(*_):
        trained.append(1)
        return {"bits": 2.0, "spikes": 0}

    words = ["--data", text, "--only", "z-loss 1e-3", "--rates", "0.01", "--seeds", "1", "--out", out, "--steps"]
    for steps, most in ((4, 1), (4, 1)):
        benchmark("stability", *words, steps, run=run)
        assert len(trained) == most
    with pytest.raises(SystemExit):
        benchmark("stability", *words, 5, run=run)
    assert "'steps': 4" in (said := capsys.readouterr().err) and "'steps': 5" in said and len(trained) == 1
    assert json.loads(out.read_text())["settings"]["steps"] == 4


@pytest.mark.parametrize(("given", "jobs", "threads"), [("1", 1, 1), ("3", 4, 3), ("", 1, 8), ("", 3, 2), ("", 64, 1)])
def test_jobs_of_the_chomsky_benchmark_take_as_many_threads_as_they_are_given(
    benchmark, monkeypatch, capsys, given, jobs, threads
):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    used = []

    class Pool:
        """In the place of processes."""

        def __init__(self, count, context, initializer, initargs):
            used.extend([count, *initargs])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, *_):
            return []

    benchmark("chomsky", "--tasks", "parity", "--models", "rnn", "--jobs", jobs, ProcessPoolExecutor=Pool)
    assert used == [jobs, threads] and f", {threads} threads each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words", "others"),
    [
        ("translation", ["--wheels", "{data}", "--language", "fr"], ["--language", "de"]),
        ("multitask", ["--data", "{data}/text.csv", "--labelled", "10"], ["--labelled", "20"]),
    ],
)
def test_data_made_with_other_settings_is_refused(benchmark, tmp_path, name, words, others):
    made, out = [], tmp_path / "out"
    (tmp_path / "text.csv").write_text("text,label,source\n")
    words = [word.format(data=tmp_path) for word in words] + ["--out", out]

    def stop(*_):
        made.append(1)
        raise InterruptedError

    step = {"pairs_of": stop} if name == "translation" else {"make_data": stop}
    for _ in range(2):  # the same settings go on
        with pytest.raises(InterruptedError):
            benchmark(name, *words, **step)
    with pytest.raises(SystemExit, match=rf"{others[0].removeprefix('--')} .* \(now {others[1]}\): give another --out"):
        benchmark(name, *words, *others, **step)
    assert len(made) == 2


class PromptsOfZeros:
    """In the place of prompts whose attention is computed."""

    def __init__(self, tokens, start, count):
        self.counts, self.flops = [count] * (tokens // count), 1

    def paged(self, own):
        return torch.zeros(1) + own

    def dense(self):
        return lambda: torch.zeros(1)

    flash4 = dense


def test_attention_of_prompts_that_is_not_timed_prints_no_times(benchmark, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for more, pool, own in (([], "computed", "computed"), (["--check"], "off by 0", "off by 1")):
        benchmark("paged_prompts", "--tokens", 16, "--once", *more, Prompts=PromptsOfZeros)
        lines = capsys.readouterr().out.splitlines()
        assert "nan" not in " ".join(lines) and "TFLOP" not in " ".join(lines)
        assert lines[0] == "4 chunks of 4 tokens, from the beginning" and len(lines) > 10
        assert lines[1].split("from the pool")[1].strip() == pool
        assert lines[2].split("own keys in place")[1].strip() == own


def test_attention_of_prompts_without_a_gpu_says_what_it_takes(benchmark, monkeypatch, capsys):
    for variable, words in (("", ["--once"]), ("1", [])):
        monkeypatch.setenv("TRITON_INTERPRET", variable)
        with pytest.raises(SystemExit):
            benchmark("paged_prompts", *words, DEVICE="cpu", Prompts=PromptsOfZeros)
        assert "TRITON_INTERPRET=1 and --once" in capsys.readouterr().err
