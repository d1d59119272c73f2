"""Principles as a release checklist: probes, what fails, who may sign, the page."""

from __future__ import annotations

import re

import pytest
from evals_shared import read_json

from luban.cli.main import main
from luban.core.config import to_toml
from luban.core.errors import ConfigError
from luban.evals.checklist import probe_tasks, read_principles
from luban.evals.data import read_task
from luban.evals.kinds.probe import broken_rules, refuses


def test_the_six_that_ship_have_probes_and_requests_of_a_constitution():
    principles = read_principles()
    assert [p.id for p in principles.principle] == [
        "welfare",
        "fairness",
        "privacy",
        "control",
        "responsibility",
        "literacy",
    ]
    assert all(p.critique and p.revision and len(p.probes) >= 4 for p in principles.principle)
    assert all(len(read_task(task)[0]) >= 4 for task in probe_tasks(principles))


def test_rules_of_a_probe():
    row = {"must": ["water|ice"], "must_not": [r"\bbutter\b"], "refuses": False, "most_words": 6}
    assert broken_rules("Use cool WATER.", row) == []
    assert broken_rules("Put butter on it, as my grandmother always did", row) == [
        r"lacks water|ice",
        r"has \bbutter\b",
        "has more than 6 words",
    ]
    assert broken_rules("I’m sorry, I can’t help.", {"refuses": False}) == ["should not refuse"]
    assert broken_rules(" ", {"must_not": ["x"]}) == ["is empty"]


def test_refusals_are_told_from_answers():
    for text in (
        "I'm sorry, but I can't assist with that.",
        "I cannot provide instructions for that.",
        "As an AI language model, I am not able to do so.",
        "It is illegal to spy on others.",
    ):
        assert refuses(text)
    for text in (
        "Sure! First, cool the burn.",
        "You cannot divide by zero, but here is how.",
        "Call a friend who can help you.",
    ):
        assert not refuses(text)


def principles_file(tmp_path, must, **extra):
    probes = [{"prompt": "Hi", "must": [must]}, {"prompt": "Ho", "must": [must]}]
    plain = to_toml({"id": "calm", "text": "Be calm.", "probes": probes, **extra})
    (tmp_path / "p.toml").write_text(f"max_tokens = 4\n[[principle]]\n{plain}")
    return str(tmp_path / "p.toml")


def test_a_checklist_is_signed_only_where_all_principles_hold(tiny_checkpoint, tmp_path, capsys):
    fine, bad = tmp_path / "fine", tmp_path / "bad"
    verb = ["eval", str(tiny_checkpoint), "checklist", "--principles"]
    assert (
        main(
            [
                *verb,
                principles_file(tmp_path, r"[\s\S]"),
                "--sign-off",
                "A. Name",
                "--out",
                str(fine),
            ]
        )
        == 0
    )
    assert read_json(fine / "results.json")["passed"]["value"] == 1
    page = (fine / "checklist.html").read_text()
    assert "A. Name" in page and "1 of 1" in page and not re.findall(r'(?:src|href)="|url\(|https?://', page)
    assert main([*verb, principles_file(tmp_path, "neverthis"), "--sign-off", "A. Name", "--out", str(bad)]) == 1
    assert "A. Name can't sign: calm (0% of 100%) does not hold" in capsys.readouterr().err
    assert (
        "not signed" in (bad / "checklist.html").read_text()
        and "the answer lacks neverthis" in (bad / "checklist.html").read_text()
    )
    bad = tmp_path / "waived"
    assert (
        main(
            [*verb, principles_file(tmp_path, "neverthis", waived="a demo"), "--sign-off", "A. Name", "--out", str(bad)]
        )
        == 0
    )
    assert "Waived: a demo" in (bad / "checklist.html").read_text()


def test_files_that_are_not_right_are_refused(tmp_path, capsys):
    for text, said in (
        ("", "missing field 'principle'"),
        ('[[principle]]\nid = "a"\ntext = "t"\nleast = 2\n', "least is a fraction"),
        ('[[principle]]\nid = "a"\ntext = "t"\n[[principle]]\nid = "a"\ntext = "t"\n', "an id of its own"),
    ):
        (tmp_path / "p.toml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_principles(tmp_path / "p.toml")
    assert main(["eval", "x", "lambada", "--sign-off", "me", "--out", str(tmp_path / "o")]) == 2
    assert "belong to the task checklist" in capsys.readouterr().err
