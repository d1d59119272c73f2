"""Conversations longer than the context: what stays by each rule, what is said to be left out."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from tiny_models import write_byte_tokenizer

from luban.core.errors import DataError
from luban.generate.cache import PromptTooLong
from luban.serve.history import SUMMARISE, History
from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import load_tokenizer

CONTEXT = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes") / "tokenizer"
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


class Summing:
    """An engine that sums everything up in the same words, and keeps what it was asked."""

    def __init__(self, tokenizer, says="they talked"):
        self.tokenizer, self.says, self.asked = tokenizer, says, []
        self.model = SimpleNamespace(spec=SimpleNamespace(context=CONTEXT))

    def tokens_of(self, messages):
        ids = render(messages, self.tokenizer, add_generation_prompt=True).token_ids
        if len(ids) >= CONTEXT:
            raise PromptTooLong("too long")
        return ids

    def generate(self, messages, sampling):
        self.asked.append(messages)
        self.tokens_of(messages)
        return [SimpleNamespace(text=self.says)]


def talk(rng, turns, system=True):
    """A conversation of some turns that ends with a question."""
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {turn} " + "x" * rng.randrange(5, 60)})
        if turn < turns - 1:
            messages.append({"role": "assistant", "content": f"answer {turn} " + "y" * rng.randrange(5, 60)})
    return messages


@pytest.mark.parametrize("rule", ["drop", "summarise", "retrieve"])
def test_what_is_sent_fits_and_nothing_is_lost_unsaid(tokenizer, rule):
    rng = random.Random()
    for _ in range(20):
        engine, messages = Summing(tokenizer), talk(rng, rng.randrange(1, 14), system=rng.random() < 0.5)
        fitted = History(engine, rule, answer_tokens=80).fit(messages)
        assert len(engine.tokens_of(fitted.messages)) <= CONTEXT - 80
        sent = [m for m in fitted.messages if m in messages]
        together = sorted((*sent, *fitted.dropped), key=messages.index)
        summed = bool(fitted.summary) and messages[0]["role"] == "system"  # its message holds the summary too
        assert together == messages[summed:] and fitted.messages[-1] == messages[-1]
        assert bool(fitted.dropped) == bool(fitted.note()) and bool(fitted.summary) == (
            rule == "summarise" and bool(fitted.dropped)
        )


def test_dropping_takes_the_fewest_of_the_oldest(tokenizer):
    engine, messages = Summing(tokenizer), talk(random.Random(), 12)
    fitted = History(engine, "drop", answer_tokens=80).fit(messages)
    count = len(fitted.dropped)
    assert fitted.dropped == messages[1 : 1 + count] and count % 2 == 0
    one_more = [messages[0], *messages[count - 1 :]]
    with pytest.raises(PromptTooLong):
        ids = engine.tokens_of(one_more)
        if len(ids) > CONTEXT - 80:
            raise PromptTooLong("it would not have left room for the answer")


def test_summaries_are_made_of_the_last_one_and_what_came_after(tokenizer):
    engine, rng = Summing(tokenizer), random.Random(3)
    history, messages = History(engine, "summarise", answer_tokens=80), talk(rng, 8)
    first = history.fit(messages)
    assert "they talked" in first.messages[0]["content"] and engine.asked[0][-1]["content"] == SUMMARISE
    count = len(engine.asked)
    history.fit(messages)
    assert len(engine.asked) == count  # kept
    more = [*messages, {"role": "assistant", "content": "z" * 50}, {"role": "user", "content": "w" * 50}]
    assert history.fit(more).summary and any("they talked" in m["content"] for m in engine.asked[-1])


def test_retrieving_keeps_what_the_question_is_about(tokenizer):
    filler = [
        [{"role": "user", "content": f"talk {i} " + "x" * 60}, {"role": "assistant", "content": "hm"}] for i in range(8)
    ]
    about = [{"role": "user", "content": "my cat is called Felix"}, {"role": "assistant", "content": "a nice name"}]
    messages = [*about, *(m for pair in filler for m in pair), {"role": "user", "content": "what is my cat called?"}]
    engine = Summing(tokenizer)
    assert about[0] in History(engine, "retrieve", answer_tokens=80).fit(messages).messages
    assert about[0] in History(engine, "drop", answer_tokens=80).fit(messages).dropped


def test_a_last_question_that_is_too_long_is_left_to_be_refused(tokenizer):
    engine = Summing(tokenizer)
    long = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "x" * 500},
    ]
    for rule in ("error", "drop", "summarise", "retrieve"):
        fitted = History(engine, rule).fit(long)
        with pytest.raises(DataError):
            engine.tokens_of(fitted.messages)


@pytest.mark.parametrize("rule", ["error", "drop", "retrieve"])
def test_a_server_leaves_messages_out_where_it_is_told_to(tiny_checkpoint, rule):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient
    from http_requests import LOCAL

    import luban
    from luban.serve.api.app import ServerOptions, create_app

    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"{i} " + "x" * 90} for i in range(9)]
    app = create_app(luban.Engine(luban.load_model(tiny_checkpoint)), ServerOptions(history=rule))
    with TestClient(app, base_url=LOCAL) as client:
        for stream in (False, True):
            body = {"messages": messages, "max_tokens": 4, "stream": stream}
            answer = client.post("/v1/chat/completions", json=body)
            if rule == "error":
                assert answer.status_code == 422 and answer.json()["error"]["code"] == "context_length_exceeded"
            else:
                assert answer.status_code == 200 and int(answer.headers["luban-messages-left-out"]) % 2 == 0
        short = client.post("/v1/chat/completions", json={"messages": messages[:1], "max_tokens": 4})
        assert short.status_code == 200 and "luban-messages-left-out" not in short.headers
