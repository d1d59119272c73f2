"""Progress, metrics, seeds and units."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from clock import Clock

from luban.core import log
from luban.core.log import Bar, Metrics, progress, read_metrics
from luban.core.seeding import derive, generator
from luban.core.units import bytes_, count, seconds


def test_metrics_reopened_at_a_step_drop_what_a_lost_run_wrote_past_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in range(1, 11):
        metrics.write(step=step, loss=1 / step)
    metrics.close()
    with open(path, "a") as file:
        file.write('{"step": 11, "lo')  # torn by a crash
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 11))
    again = Metrics(path, keep_until=6)
    again.write(step=7, loss=0.5)
    again.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7] and rows[-1]["loss"] == 0.5


def test_a_bar_shows_share_rate_and_time_left(capsys):
    clock = Clock()
    bar = Bar("packing", total=100, unit="docs", clock=clock)
    clock.advance(10)
    bar.advance(25, note="hello")
    line = capsys.readouterr().err
    assert "packing" in line and "25%" in line and "2.5 docs/s" in line and "30.0s left" in line and "hello" in line


def test_a_resumed_bar_counts_its_rate_from_where_it_began():
    clock = Clock()
    bar = Bar("training", total=100, unit="steps", start=90, clock=clock)
    clock.advance(10)
    bar.advance(5)
    assert "0.5 steps/s" in bar.line(clock()) and "10.0s left" in bar.line(clock())


def test_a_first_step_that_was_compiled_is_soon_forgotten_and_stays_in_the_average():
    clock = Clock()
    bar = Bar("training", total=1000, unit="steps", clock=clock)
    clock.advance(100)
    bar.advance()
    for _ in range(499):
        clock.advance(1)
        bar.advance()
    assert "  1 steps/s" in bar.line(clock()) and "8m20s left" in bar.line(clock())
    for steps in (-20, 20, 500):  # going back is no negative rate; the rest takes no time
        bar.advance(steps)
        assert "-" not in bar.line(clock())
    assert f"{1000 / 599:.3g} steps/s  in 9m59s" in bar.line(clock())


@pytest.mark.parametrize("more", [0, 2])
def test_the_last_state_is_said_once_where_there_is_no_terminal(capsys, more):
    clock = Clock()
    with progress("packing", 7, clock=clock) as bar:
        clock.advance(log.PLAIN_EVERY + 1)
        bar.advance(5)
        bar.advance(more)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if more else 1) and f"{5 + more}/7" in lines[-1]


def test_short_work_shows_nothing(capsys):
    clock = Clock()
    with progress("quick", 3, clock=clock) as bar:
        clock.advance(log.SHOW_AFTER - 0.1)
        bar.advance(3)
    assert capsys.readouterr().err == ""


def test_warnings_come_once(capsys):
    text = f"only once {os.urandom(8).hex()}"
    log.warn(text)
    log.warn(text)
    assert capsys.readouterr().err == f"warning: {text}\n"


def test_seeds_depend_on_every_name():
    seeds = {
        derive(s, *names)
        for s in range(20)
        for names in ((), ("a",), ("b",), ("a", 1), ("a", 2), ("a1",), ("a", "1", ""))
    }
    assert len(seeds) == 20 * 7 and all(0 <= s < 2**63 for s in seeds)
    assert np.array_equal(generator(3, "x").random(5), generator(3, "x").random(5))


def test_units():
    assert [count(n) for n in (5, 12_345_678, 1.5e12, 999)] == ["5", "12.3M", "1.5T", "999"]
    assert [bytes_(n) for n in (0, 1500, 8.1e10)] == ["0 B", "1.5 kB", "81 GB"]
    assert [seconds(s) for s in (4.25, 65, 3725)] == ["4.2s", "1m05s", "1h02m"]


@pytest.mark.parametrize(
    "work", ["say('more')", "Bar('training', 10, 'steps', clock=iter(range(0, 10**6, 60)).__next__).advance()"]
)
def test_a_closed_standard_error_ends_no_work(work):
    """Also where a bar draws, and where Python flushes its streams at the end."""
    code = f"import sys; from luban.core.log import Bar, say; say('begun'); sys.stdin.readline(); {work}; {work}; print('done')"
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as process:
        assert process.stderr.readline() == "begun\n"
        process.stderr.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stdout.read() == "done\n" and process.wait() == 0


def test_numbers_that_json_has_not_are_null_in_metrics(tmp_path):
    metrics = Metrics(tmp_path / "m.jsonl")
    metrics.write(step=1, loss=math.nan, nested={"norm": [math.inf, 1.5]})
    metrics.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": null, "nested": {"norm": [null, 1.5]}}\n'


def test_numbers_just_below_a_unit_are_written_in_it():
    for n in (999_600, 999_600_000, 999_600_000_000):
        assert "e+" not in count(n) + bytes_(n)
        assert bytes_(n).split()[0] == "1" and bytes_(0.999 * n).startswith("999")
