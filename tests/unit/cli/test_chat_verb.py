"""`luban chat` from lines of input: what is left out of the context is said, tools need a template that has them."""

from __future__ import annotations

import io

import pytest

from luban.cli.main import main


@pytest.fixture
def chat(tiny_checkpoint, monkeypatch, capsys):
    def run(text, *flags):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        code = main(["chat", str(tiny_checkpoint), "--max-tokens", "8", "--seed", "1", *flags])
        return code, *capsys.readouterr()

    return run


def test_what_goes_is_said_and_can_be_seen(chat):
    lines = [f"line {i} " + "x" * 150 for i in range(5)]
    code, _, err = chat("\n".join([lines[0], "/history", *lines[1:], "/history"]))
    assert code == 0 and "the model reads the whole conversation" in err
    assert "left out of the context; /history" in err and f"left out: user: {lines[0]}" in err
    assert "begins anew" not in err
    code, _, err = chat("\n".join(lines), "--history", "error")
    assert code == 0 and "the prompt has" in err and "begins anew" in err


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--tools", "calculator"), 1, "chat template"),
        (("--tools", "nothing"), 2, "there is no tool 'nothing'"),
        (("--tools", "sql:missing.db"), 1, "no database"),
        (("--tool-calls", "3"), 2, "--tool-calls does nothing without --tools"),
        (("--tools", "calculator", "--tool-calls", "-1"), 2, "calls must be 0 or more"),
    ],
)
def test_tools_that_cannot_be_used_are_named(chat, flags, code, words):
    found, _, err = chat("hello", *flags)
    assert found == code and words in err and len(err.strip().splitlines()) == 1
