"""Flags of all verbs: each says in --help what it is, and none is taken without a word where it would do nothing."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

import luban.cli
from luban.cli.main import main

FILES = sorted(Path(luban.cli.__file__).parent.glob("*.py"))


def fields_with_hidden_comments(source: str) -> list[str]:
    """Fields of classes over several lines with a comment inside, which the help page doesn't show."""
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return [
        ast.unparse(node.target)
        for parent in ast.walk(ast.parse(source))
        if isinstance(parent, ast.ClassDef)
        for node in parent.body
        if isinstance(node, ast.AnnAssign)
        and node.end_lineno != node.lineno
        and commented.intersection(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_comments_of_fields_stand_where_the_help_page_reads_them(file):
    assert fields_with_hidden_comments(file.read_text(encoding="utf-8")) == []


def test_hidden_comments_are_found():
    source = (
        "class A:\n    # seen\n    a: int = 1\n    b: int = 1  # seen\n    c: int = (\n        1  # hidden\n    )\n"
    )
    assert fields_with_hidden_comments(source) == ["c"]


@pytest.mark.parametrize(
    ("verb", "flag", "said"),
    [
        ("serve", "--passages", "of the index before a question"),
        ("serve", "--preemption", "where memory is short"),
        ("generate", "--top-p", "keep the likeliest tokens"),
    ],
)
def test_the_help_page_shows_them(verb, flag, said, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert said in words.split(f" {flag} ", 1)[1][:120]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["serve", "nowhere", "--passages", "3"], "--passages does nothing without --index"),
        (["serve", "nowhere", "--rerank", "x"], "--rerank does nothing without --index"),
        (["serve", "nowhere", "--draft-tokens", "2"], "--draft-tokens does nothing without --draft or --speculative"),
        (["serve", "nowhere", "--swap-gb=4"], "--swap-gb does nothing without --preemption swap"),  # its default, too
        (["serve", "nowhere", "--log-text"], "--log-text does nothing without --log-requests"),
        (["serve", "nowhere", "--max-adapters", "2"], "--max-adapters does nothing without --adapter NAME=DIR or"),
        (["serve", "nowhere", "--runtime-adapters", "--replicas", "2"], "--runtime-adapters is for one server"),
        (["serve", "nowhere", "--runtime-adapters", "--adapter", "runs/a"], "give --adapter NAME=runs/a"),
        (["generate", "nowhere", "x", "--draft-tokens", "2"], "--draft-tokens does nothing without --draft or"),
        (["generate", "nowhere", "x", "--length-penalty", "2"], "--length-penalty does nothing without --beams"),
        (["generate", "nowhere", "x", "--out", "a.jsonl"], "--out does nothing without --best-of N and --reward"),
        (["generate", "nowhere", "x", "--pairs"], "--pairs does nothing without --out FILE.jsonl"),
        (["chat", "nowhere", "--tool-calls", "2"], "--tool-calls does nothing without --tools"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(words, said, capsys):
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["serve", "nowhere", "--speculative", "ngram", "--draft-tokens", "2"], "nowhere does not exist"),
        (["serve", "nowhere", "--preemption", "swap", "--swap-gb", "1"], "nowhere does not exist"),
        (["serve", "nowhere", "--log-requests", "--log-text"], "nowhere does not exist"),
        (["serve", "nowhere", "--runtime-adapters", "--max-adapters", "2"], "nowhere does not exist"),
        (["generate", "nowhere", "x", "--beams", "2", "--length-penalty", "2"], "nowhere does not exist"),
    ],
)
def test_beside_what_they_need_they_are_taken(words, missing, capsys):
    assert main([*words, "--port", "0"] if words[0] == "serve" else words) == 1
    assert missing in capsys.readouterr().err


@pytest.mark.parametrize("words", [["serve", "nowhere"], ["generate", "nowhere", "x"]])
def test_tokens_are_guessed_in_one_way_and_that_is_said_before_a_model_is_read(words, capsys):
    assert main([*words, "--draft", "a", "--speculative", "ngram"]) == 2
    assert "--draft and --speculative both guess tokens" in capsys.readouterr().err


def test_an_error_names_the_flag_without_the_help_page(capsys):
    assert main(["serve", "m", "--max-queue", "abc"]) == 2
    said = capsys.readouterr().err
    assert "--max-queue" in said and "'abc'" in said and "helptext" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rag ask index model question --sentences x", "--sentences: a whole number is needed, 'x' given"),
        ("serve model --cache-gb x", "--cache-gb: a number is needed, 'x' given"),
        ("serve model --port 8.5", "--port: a whole number is needed, '8.5' given"),
        ("serve model --drain-seconds it's", '--drain-seconds: a number is needed, "it\'s" given'),
        ("rag search index", "QUERY words or a question (required) (see luban rag search --help)"),
    ],
)
def test_a_value_of_another_type_is_named_with_what_is_needed(words, said, capsys):
    assert main(words.split()) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1, printed
