"""Annotation page, leaderboard, checklist and comparison clicked through in a real browser; none asks anybody else."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from browser import CHROMIUM, DRIVER
from evals_shared import CHOICE, COLOURS, read_lines, write_task

from luban.cli.main import main

pytest.importorskip("fastapi")
if not (CHROMIUM and DRIVER):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)


pytestmark = pytest.mark.slow  # servers and a browser are started


def serve(file, out, *options):
    """The annotation page's process and address."""
    command = [
        sys.executable,
        "-m",
        "luban",
        "annotate",
        str(file),
        "--serve",
        "--out",
        str(out),
        "--port",
        "0",
        *options,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r"page at (http://\S+)", line):
            return process, found[1]
    raise AssertionError("no page")


def keys(browser, text):
    browser.script(
        f"[...{json.dumps(text)}].forEach(key => document.body.dispatchEvent(new KeyboardEvent('keydown', {{key, bubbles: true}})))"
    )


def test_labels_by_keyboard_and_mouse_survive_a_killed_server(browser, tmp_path):
    rows = [{"prompt": f"Question {i} <script>", "output_1": f"one {i}", "output_2": f"two {i}"} for i in range(4)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "labels.sqlite"
    process, address = serve(file, out, "--annotators", "ann=k1", "ben=k2")
    browser.open(address)
    browser.until("!document.getElementById('login').hidden")
    browser.type("#key", "k1")
    browser.script("document.getElementById('login').requestSubmit()")
    browser.until("document.getElementById('left').textContent")
    assert browser.script("document.getElementById('who').textContent") == "ann: 0 of 4"
    wanted = []
    for number, key in enumerate("19"):
        shown = {side: browser.script(f"document.getElementById('{side}').textContent") for side in ("left", "right")}
        wanted.append(shown["left" if key == "1" else "right"])
        keys(browser, "f" + key)
        browser.until(f"document.getElementById('who').textContent === 'ann: {number + 1} of 4'")
    browser.click("#scale button:nth-child(5)")
    browser.until("document.getElementById('who').textContent === 'ann: 3 of 4'")
    keys(browser, "z")
    browser.until("document.getElementById('who').textContent === 'ann: 2 of 4'")
    browser.picture(tmp_path / "annotation.png")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    keys(browser, "5")
    browser.until("document.getElementById('message').textContent.includes(\"isn't kept\")")
    assert main(["annotate", str(file), "--export", str(tmp_path / "prefs.jsonl"), "--out", str(out)]) == 0
    labels = read_lines(tmp_path / "prefs.jsonl")
    assert sorted(row["chosen"] for row in labels) == sorted(wanted) and {row["grade"] for row in labels} == {0}
    assert not [line for line in browser.log() if "SEVERE" in line and address in line]


def test_pages_of_results_are_drawn_and_ask_nobody(browser, tiny_checkpoint, tmp_path):
    names = ("a", "b", "c")
    for number, name in enumerate(names):
        rows = [{"prompt": f"q{i}", "answer": "x" * (i % 5 + number + 1)} for i in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        main(
            [
                "judge",
                *(str(tmp_path / f"{n}.jsonl") for n in names),
                "--judge",
                "rule:first",
                "--out",
                str(tmp_path / "judged"),
            ]
        )
        == 0
    )
    task = write_task(tmp_path, "colours", CHOICE, COLOURS)
    for shots in ("0", "2"):
        assert main(["eval", str(tiny_checkpoint), task, "--shots", shots, "--out", str(tmp_path / f"e{shots}")]) == 0
    assert main(["report", str(tmp_path / "e0"), str(tmp_path / "e2"), "--out", str(tmp_path / "report.html")]) == 0
    principles = tmp_path / "p.toml"
    principles.write_text(
        'max_tokens = 4\n[[principle]]\nid = "calm"\ntext = "Be calm."\nprobes = [{prompt = "Hi", must = ["calm"]}]\n'
    )
    assert (
        main(
            [
                "eval",
                str(tiny_checkpoint),
                "checklist",
                "--principles",
                str(principles),
                "--out",
                str(tmp_path / "check"),
            ]
        )
        == 0
    )
    browser.open((tmp_path / "judged" / "leaderboard.html").as_uri())
    assert browser.script("document.querySelectorAll('#ratings tr').length") == 4
    shown = "[...document.querySelectorAll('.match')].filter(card => !card.hidden).length"
    assert browser.script(shown) == 30
    browser.click("#turned")
    assert browser.script(shown) == 30  # an always-first judge's verdicts all depend on the order
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.script("document.querySelectorAll('table.comparison tr').length") >= 2
    browser.open((tmp_path / "check" / "checklist.html").as_uri())
    assert browser.script("document.querySelector('.mark.fails') !== null && document.querySelector('details').open")
    asked = browser.script("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert not [name for name in asked if not name.startswith(("data:", "file:"))]
