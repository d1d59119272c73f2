"""Two evaluations beside each other: differences of what both have, and in which settings they differ."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from luban.cli.main import main
from luban.core.artifact import ArtifactWriter, as_parent
from luban.core.jsonl import write_rows
from luban.report.alignment_tax import stages_of, tax_tree
from luban.report.comparison import Difference, compare
from luban.report.gather import find_artifacts


def evaluation(path, scores, **config):
    with ArtifactWriter(
        path, kind="evaluation", config={"tasks": {"t": {"spec": {"shots": 0}, "data": "d"}}, "chat": "off", **config}
    ) as art:
        rows = [
            {"task": "t", "item": i, "prompt": f"q{i} <b>", "answer": f"a{v}", "scores": {"acc": v, "nats": 3.0}}
            for i, v in scores.items()
        ]
        write_rows(art.path / "answers.jsonl", [*rows, {"task": "t", "item": "broken", "scores": None}])
    return path


def test_differences_are_paired_by_item_and_their_p_value_is_small_where_there_is_one(tmp_path):
    rng = random.Random(4)
    a = {str(i): float(rng.random() < 0.5) for i in range(120)}
    b = {str(i): max(a[str(i)], float(rng.random() < 0.3)) if i < 110 else 0.0 for i in reversed(range(10, 130))}
    folders = [evaluation(tmp_path / "a", a), evaluation(tmp_path / "b", b), evaluation(tmp_path / "c", a)]
    better, same = compare(find_artifacts(folders, by_age=False))
    (found,) = better.differences
    shared = [str(i) for i in range(10, 120)]
    gaps = np.array([b[i] - a[i] for i in shared])
    assert found.n == 110 and found.difference == pytest.approx(gaps.mean()) and better.apart == {"t": 20}
    assert found.interval[0] <= found.difference <= found.interval[1]
    assert (
        same.differences[0].p_value == 1 and same.differences[0].verdict == "no difference shown" and not same.cautions
    )
    assert len(better.changed) == 12


def test_groups_of_items_are_compared_by_themselves(tmp_path, capsys):
    rng, folders = random.Random(8), [tmp_path / "a", tmp_path / "b"]
    group_of = {str(i): rng.choice(["as", "bs", "cs"]) for i in range(60)}
    scores = []
    for folder in folders:
        scores.append({item: {"acc": float(rng.random() < 0.5), "brier": rng.random()} for item in group_of})
        with ArtifactWriter(folder, kind="evaluation", config={"tasks": {}}) as art:
            moved = {"3": "other"} if folder.name == "b" else {}  # an item of other data with the same name
            write_rows(
                art.path / "answers.jsonl",
                [
                    {"task": "t", "item": i, "prompt": "q", "answer": "a", "scores": s, "group": (group_of | moved)[i]}
                    for i, s in scores[-1].items()
                ],
            )
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "page.html")]) == 0
    printed, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    (found,) = compare(find_artifacts(folders, by_age=False))
    assert [each.score for each in found.differences] == ["acc", "brier"] and found.differences[0].n == 60
    assert len(found.groups) == 6
    for each in found.groups:
        name, group = each.score.split("/")
        items = [i for i, own in group_of.items() if own == group and i != "3"]
        first, second = (np.mean([of[i][name] for i in items]) for of in scores)
        assert (each.first, each.second, each.n) == (pytest.approx(first), pytest.approx(second), len(items))
        assert f"t/{each.score} " in printed and f"<td>{each.score}</td>" in page


def test_less_is_better_in_a_group_as_it_is_in_the_whole():
    fields = {"task": "t", "first": 0.2, "second": 0.4, "interval": (0.1, 0.3), "p_value": 0.001, "n": 9}
    for score, better in (("acc/as", "second"), ("brier/as", "first"), ("brier", "first"), ("acc/brier", "second")):
        assert Difference(score=score, **fields).verdict == better


def test_settings_that_differ_are_named_and_the_page_asks_nobody(tmp_path, capsys):
    scores = {str(i): float(i % 2) for i in range(30)}
    flipped = dict.fromkeys(scores, 1.0)
    a = evaluation(tmp_path / "a", scores)
    b = evaluation(tmp_path / "b", flipped, chat="on", tasks={"t": {"spec": {"shots": 3}, "data": "other"}})
    assert main(["report", str(a), str(b), "--out", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"t/acc +0\.5000 → 1\.0000  \+0\.5000 .* n = 30  second", printed)
    assert (
        "they differ in chat: 'off' and 'on'" in printed
        and "t.data: other data" in printed
        and "t.spec.shots: 0 and 3" in printed
    )
    page = (tmp_path / "page.html").read_text()
    assert "b against a" in page and "q0 &lt;b&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!#)|url\(|https?://(?!www\.w3\.org)', page)


def model(path, parent=None):
    parents = () if parent is None else (as_parent("init", parent),)
    with ArtifactWriter(path, kind="run", config={"name": path.name}, parents=parents) as art:
        (art.path / "w").write_text(path.name)
    return path


def measured(path, scores, of=None):
    parents = () if of is None else (as_parent("model", of),)
    config = {"tasks": {"t": {}}, "model": path.name}
    with ArtifactWriter(path, kind="evaluation", config=config, parents=parents) as art:
        write_rows(
            art.path / "answers.jsonl",
            [
                {"task": "t", "item": str(i), "prompt": "q", "answer": v, "scores": {"acc": v}}
                for i, v in enumerate(scores)
            ],
        )
    return path


def test_every_stage_is_measured_against_the_nearest_measured_ancestor(tmp_path):
    base = model(tmp_path / "base")
    sft = model(tmp_path / "sft", base)
    skipped = model(tmp_path / "skipped", sft)
    rl = model(tmp_path / "rl", skipped)
    folders = [
        measured(tmp_path / "e0", [0.0, 1.0] * 20, base),
        measured(tmp_path / "e1", [1.0, 1.0] * 20, sft),
        measured(tmp_path / "e2", [0.0, 1.0] * 10 + [0.0] * 20, rl),
        measured(tmp_path / "e3", [0.0] * 40),
    ]
    found = find_artifacts(folders, by_age=False)
    stages = {stage.model: stage for stage in stages_of(found)}
    assert {name: stage.before for name, stage in stages.items()} == {"base": "e3", "sft": "base", "rl": "sft"}
    assert [d.difference for d in stages["sft"].gained] == [0.5] and not stages["sft"].lost
    assert [d.difference for d in stages["rl"].lost] == [-0.75]
    drawn = tax_tree(found, list(stages.values()))
    assert drawn.count('class="edge"') == 3 and "−1 · acc -0.750" in drawn and "+1 · acc +0.500" in drawn
    assert not stages_of(found[:1]) and tax_tree(found[:1], []) == ""
    out = tmp_path / "page.html"
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    assert "Alignment tax" in out.read_text()
