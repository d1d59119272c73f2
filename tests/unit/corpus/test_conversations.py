"""Conversations with calls of tools go through a corpus whole."""

from __future__ import annotations

import json

import pytest

from luban.corpus.arrow import require_pyarrow
from luban.corpus.build import build_corpus
from luban.corpus.document import Document, check_messages
from luban.corpus.reader import read_corpus
from luban.corpus.steps import make_step
from luban.corpus.tally import Tally

CALL = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"zone": "a@b.org"}'}}
TURNS = [
    {"role": "user", "content": "write to x@y.org at　once"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "12:00"},
    {"role": "assistant", "content": "noon"},
]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {}}}]


def test_calls_results_and_tools_reach_the_corpus(tmp_path):
    rows = [
        {"messages": TURNS, "tools": TOOLS},
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}
            ]
        },
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = build_corpus([str(tmp_path / "in.jsonl")], tmp_path / "c", heldout=0.0)
    first, second, third = read_corpus(tmp_path / "c")
    assert first.messages == TURNS and first.tools == TOOLS and not figures["unusable"]
    assert first.text == "write to x@y.org at　once\n12:00\nnoon" and "now" not in first.text
    assert second.messages == [{"role": "assistant", "content": None, "tool_calls": [CALL]}] and second.text == ""
    assert third.messages == [{"role": "user", "content": "in parts"}] and third.tools is None


def test_calls_and_tools_are_read_from_parquet_too(tmp_path):
    pyarrow, parquet = require_pyarrow("this test")
    columns = {"messages": [json.dumps(TURNS)], "tools": [json.dumps(TOOLS)]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    build_corpus([str(tmp_path / "in.parquet")], tmp_path / "c", heldout=0.0)
    (document,) = read_corpus(tmp_path / "c")
    assert document.messages == TURNS and document.tools == TOOLS


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "user", "content": None, "tool_calls": [CALL]},
        {"role": "user"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": "", "tool_calls": "now()"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": "{}"}}]},
        {"role": 1, "content": ""},
        "hello",
        {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
        {"role": "user", "content": 3},
        {"role": "assistant", "content": "", "weight": 0.5},
        {"role": "assistant", "content": "", "weight": "0"},
    ],
)
def test_turns_that_hold_nothing_to_read_are_refused(message):
    with pytest.raises(ValueError, match=r"message|tool_calls"):
        check_messages([message])


@pytest.mark.parametrize("step", ["personal", "normalise", "normalise=quotes", "spelling"])
def test_steps_rewrite_contents_and_no_calls_but_their_addresses(step):
    document = Document(id="a", text="write to x@y.org at　once\n12:00\nnoon", source="s", messages=TURNS)
    try:
        (changed,) = make_step(step)([document], Tally())
    except Exception as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        raise
    assert [m["role"] for m in changed.messages] == [m["role"] for m in TURNS]
    called = (
        json.loads(json.dumps(TURNS[1]).replace("a@b.org", "someone@example.com")) if step == "personal" else TURNS[1]
    )
    assert changed.messages[1] == called and changed.messages[3] == TURNS[3]  # addresses in calls are personal, too
    assert changed.text == "\n".join(m["content"] for m in changed.messages if m["content"] is not None)


def same(one, other, *, tools=(None, None)) -> bool:
    documents = [
        Document(id=str(i), text="t", source="s", messages=m, meta=t and {"tools": t})
        for i, (m, t) in enumerate(zip((one, other), tools, strict=True))
    ]
    return len(list(make_step("exact")(documents, Tally()))) == 1


def test_repeated_conversations_are_the_same_in_every_turn():
    one = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert same(one, [dict(reversed(m.items())) for m in one])
    assert not same(one, [{"role": "system", "content": "a"}, one[1]])
    assert not same(one, [{"role": "user", "content": "a\nb"}])
    called = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    other = [{**called[0], "tool_calls": [{**CALL, "function": {"name": "then", "arguments": "{}"}}]}]
    assert same(called, called) and not same(called, other)
    assert same(called, called, tools=(TOOLS, TOOLS)) and not same(called, called, tools=(TOOLS, None))
