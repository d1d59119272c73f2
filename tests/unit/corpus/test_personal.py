"""Addresses are replaced, and what only looks like one is not."""

from __future__ import annotations

import pytest

from luban.corpus.document import Document
from luban.corpus.steps.personal import personal, scrub
from luban.corpus.tally import Tally


@pytest.mark.parametrize("text, expected", [
    ("Write to jane.doe+x@mail.example.co.uk, please.", "Write to someone@example.com, please."),
    ("<a@b.org>", "<someone@example.com>"),
    ("@decorator and a @ b and x@y", "@decorator and a @ b and x@y"),
    ("ping 8.8.8.8 now", "ping 192.0.2.1 now"),
    ("at 8.8.4.4.", "at 192.0.2.1."),
    ("home is 127.0.0.1 or 192.168.1.7 or 10.0.0.1", "home is 127.0.0.1 or 192.168.1.7 or 10.0.0.1"),
    ("version 1.2.3.4.5 and 999.1.1.1 and 3.11.7", "version 1.2.3.4.5 and 999.1.1.1 and 3.11.7"),
])  # fmt: skip
def test_scrubbing(text, expected):
    assert scrub(text, Tally()) == expected
    assert scrub(expected, Tally()) == expected


def test_conversations_are_scrubbed_and_everything_is_counted():
    messages = [{"role": "user", "content": "I am a@b.org"}, {"role": "assistant", "content": "You are at 8.8.8.8"}]
    tally = Tally()
    [found] = personal([Document(id="a", text="unused", source="s", messages=messages)], tally)
    assert found.text == "I am someone@example.com\nYou are at 192.0.2.1"
    assert [m["content"] for m in found.messages] == found.text.split("\n")
    assert tally.counts == {"emails_replaced": 1, "ip_addresses_replaced": 1}
