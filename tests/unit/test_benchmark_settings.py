"""Benchmarks that keep rows or take names: wrong names and rows of other settings are refused before anything is trained."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from luban.core.errors import ConfigError

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


def test_kept_runs_of_stability_are_taken_for_their_own_settings_alone(benchmark, text, tmp_path):
    out, trained = tmp_path / "runs.json", []

    def run(*_):
        trained.append(1)
        return {"bits": 2.0, "spikes": 0}

    words = ["--data", text, "--only", "z-loss 1e-3", "--rates", "0.01", "--seeds", "1", "--out", out, "--steps"]
    for steps, most in ((4, 1), (4, 1)):
        benchmark("stability", *words, steps, run=run)
        assert len(trained) == most
    with pytest.raises(SystemExit, match=r"runs.json was made with steps 4 \(now 5\): give another --out"):
        benchmark("stability", *words, 5, run=run)
    assert len(trained) == 1 and json.loads(out.read_text())["settings"]["steps"] == 4


@pytest.mark.parametrize("others", [["--steps", "3"], ["--budget", "9GB"], ["--tiny"]])
def test_kept_rows_of_adapters_are_compared_with_those_of_their_own_settings_alone(benchmark, tmp_path, others, capsys):
    out, row = tmp_path / "rows.json", {"tokens_per_second": 8.0, "spread": 0.0, "peak_gib": 1.0, "start_s": 1.0}
    ran = []

    def one(command, **_):
        ran.append(command[command.index("--alone") + 1])
        row["tokens_per_second"] *= 2
        return SimpleNamespace(returncode=0, stdout=json.dumps(row), stderr="")

    words, found = ["--steps", "2", "--out", out, "--only"], {"subprocess": SimpleNamespace(run=one)}
    for name in ("luban", "luban-nf4"):
        benchmark("adapters", *words, name, **found)
    assert "luban-nf4 is 2.00 × luban" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=rf"rows.json was made with {others[0][2:]} .* \(now .*\): give another --out"):
        benchmark("adapters", *words, "peft", *others, **found)
    assert ran == ["luban", "luban-nf4"]


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


def test_options_of_the_chomsky_benchmark_are_fields_of_its_protocols(benchmark, capsys):
    planned = []

    class Pool:
        """In the place of processes."""

        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def map(self, function, protocols, *_):
            planned.extend(protocols)
            return []

    words = [
        "--longest",
        7,
        "--test-to",
        20,
        "--layers",
        2,
        "--width",
        32,
        "--lr",
        3e-3,
        "--position-range",
        99,
        "--steps",
        5,
    ]
    asked = ("chomsky", "--tasks", "parity", *words, "--short", "--models")
    with pytest.raises(ConfigError, match="randomised"):  # of which this one has none
        benchmark(*asked, "transformer", ProcessPoolExecutor=Pool)
    benchmark(*asked, "transformer_random_rope", ProcessPoolExecutor=Pool)
    (made,) = planned
    assert (made.longest, made.test_from, made.test_to, made.test_step) == (7, 8, 20, 3)
    assert (made.layers, made.width, made.lr, made.position_range, made.steps) == (2, 32, 3e-3, 99, 5)
    assert "accuracy at 8–20 in %, trained: at 1–7" in capsys.readouterr().out


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
