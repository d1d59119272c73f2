"""Conversations are compared by roles, contents and tool calls, not by their joined text."""

from __future__ import annotations

import json
import random

import pytest

from luban.corpus.build import build_corpus
from luban.corpus.document import Document, conversation_text
from luban.corpus.reader import read_corpus
from luban.corpus.steps import make_step
from luban.corpus.tally import Tally


def conversation(number: int, messages: list[dict]) -> Document:
    return Document(id=str(number), text=conversation_text(messages), source="s", messages=messages)


def call(name: str, identifier: str = "c1", **arguments) -> dict:
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def say(*turns: tuple[str, str], **more) -> list[dict]:
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[-1].update(more)
    return messages


LONG = " ".join(f"word{i}" for i in range(60))
ANSWER = " ".join(f"answer{i}" for i in range(60))
DIFFERENT = [
    say(("user", LONG), ("assistant", ANSWER)),
    say(("assistant", LONG), ("user", ANSWER)),  # the same text in other roles
    say(("system", LONG), ("assistant", ANSWER)),
    say(("user", f"{LONG}\n{ANSWER}")),  # the same text in one message
    say(("user", LONG), ("assistant", ANSWER), tool_calls=[call("search", query=ANSWER[::-1])]),
    say(("user", LONG), ("assistant", ANSWER), tool_calls=[call("delete", query=LONG[::-1])]),
]


def kept(step: str, conversations: list[list[dict]]) -> list[int]:
    documents = [conversation(i, messages) for i, messages in enumerate(conversations)]
    return [int(document.id) for document in make_step(step)(documents, Tally())]


def test_exact_keeps_what_differs_in_roles_or_calls_and_drops_what_does_not():
    assert kept("exact", [*DIFFERENT, *DIFFERENT[::-1]]) == [0, 1, 2, 3, 4, 5]
    text = Document(id="t", text=conversation_text(DIFFERENT[0]), source="s")
    assert len(list(make_step("exact")([text, conversation(0, DIFFERENT[0])], Tally()))) == 2


def test_random_identifiers_of_calls_make_no_difference():
    one = say(("user", "q"), ("assistant", ""), tool_calls=[call("f", "call_1", x=1)])
    two = say(("user", "q"), ("assistant", ""), tool_calls=[call("f", "call_2", x=1)])
    assert kept("exact", [one, two]) == [0]
    keys = [{"role": "user", "content": "q", "name": "n"}], [{"name": "n", "content": "q", "role": "user"}]
    assert kept("exact", list(keys)) == [0]


def test_the_tools_that_are_offered_and_turns_without_content_count():
    calls = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call("f", x=1)]}]
    others = [calls[0], {**calls[1], "tool_calls": [call("f", x=2)]}]
    documents = [
        Document(id=str(i), text="q", source="s", messages=messages, meta=meta)
        for i, (messages, meta) in enumerate(
            [
                (calls, None),
                (others, None),
                (calls, {"tools": [{"name": "f"}]}),
                (calls, {"tools": [{"name": "g"}]}),
                (calls, {"url": "x"}),
                (calls, {"tools": [{"name": "f"}], "url": "x"}),
            ]
        )
    ]
    assert [document.id for document in make_step("exact")(documents, Tally())] == ["0", "1", "2", "3"]


def test_minhash_compares_words_with_their_roles_and_calls():
    near = say(("user", LONG + " more"), ("assistant", ANSWER))
    assert kept("minhash", [DIFFERENT[0], DIFFERENT[1], near]) == [0, 1]
    long_call = say(("user", "q"), ("assistant", ""), tool_calls=[call("search", query=LONG)])
    other_call = say(("user", "q"), ("assistant", ""), tool_calls=[call("search", query=ANSWER)])
    assert kept("minhash", [long_call, other_call, long_call]) == [0, 1]


@pytest.mark.parametrize("step", ["exact", "minhash"])
def test_brute_force_on_random_conversations(step):
    """Few roles, words and calls, so that many conversations share their text; dropped are the same ones only."""
    rng = random.Random()
    texts = [" ".join(f"{letter}{i}" for i in range(50)) for letter in "ab"]
    drawn = []
    for _ in range(150):
        messages = say(*((rng.choice(["user", "assistant"]), rng.choice(texts)) for _ in range(2)))
        if rng.random() < 0.5:
            messages[-1]["tool_calls"] = [
                call(rng.choice("fg"), q=" ".join(f"{rng.choice('xyz')}{i}" for i in range(40)))
            ]
        drawn.append(messages)
    first = {json.dumps(messages, sort_keys=True): i for i, messages in reversed(list(enumerate(drawn)))}
    if step == "exact":
        assert kept(step, drawn) == sorted(first.values())
    else:  # every exact copy goes; of turns with the same roles and texts, in either order (a near twin), one stays
        left = set(kept(step, drawn))
        assert left <= set(first.values())
        turns = [tuple(sorted((m["role"], m["content"]) for m in messages)) for messages in drawn]
        assert {turns[i] for i in left} == set(turns)


def test_a_build_keeps_them_apart(tmp_path):
    rows = [{"messages": messages} for messages in DIFFERENT[:3] * 2]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = build_corpus([str(tmp_path / "in.jsonl")], tmp_path / "c", heldout=0.0, steps=("exact", "minhash"))
    assert [d.messages for d in read_corpus(tmp_path / "c")] == DIFFERENT[:3]
    assert figures["dropped"]["exact"]["documents"] == 3
