"""ShareGPT's conversations: cleaned, cut between exchanges, trained on the assistant's turns alone."""

from __future__ import annotations

import json
import random

import pytest
from evals_shared import read_lines
from tiny_models import write_byte_tokenizer

from luban.align.sharegpt import as_chat, clean, convert_sharegpt, cut_turns
from luban.cli.main import main
from luban.core.errors import DataError
from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


def turns(*texts, first="human"):
    names = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]


def test_html_becomes_text_and_plain_text_stays():
    assert (
        clean("<p>Use <code>ls</code> &amp; go:</p><ul><li>one</li><li>two</li></ul>") == "Use ls & go:\n\n- one\n- two"
    )
    assert clean("<pre>Copy code\nprint(1)</pre>") == "```\n\nprint(1)\n```"
    assert clean("a < b and c > d, List<int>") == "a < b and c > d, List<int>"
    assert clean("2 / 2\nYes") == "Yes"


def test_conversations_begin_with_the_user_alternate_and_end_with_an_answer():
    assert as_chat(turns("cut off", "q", "a", "left over", first="gpt")[:4]) == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    untrained = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]
    assert as_chat(untrained)[1] == {"role": "assistant", "content": "a", "weight": 0}
    assert as_chat([*turns("q", "a"), *turns("b", first="gpt")]) == "turns don't alternate"
    assert as_chat(turns("q", " ")) == "empty turn" and as_chat(turns("q")) == "no answer"
    assert as_chat([{"from": "robot", "value": "x"}]) == "unknown role"


def test_pieces_fit_hold_whole_exchanges_and_all_of_them(tokenizer):
    rng = random.Random()
    for _ in range(20):
        spoken = [
            {"role": role, "content": "".join(rng.choices("abcdef ghi", k=rng.randint(1, 60))).strip() or "x"}
            for _ in range(rng.randint(1, 6))
            for role in ("user", "assistant")
        ]
        messages = [{"role": "system", "content": "Be kind."}, *spoken]
        pieces, dropped = cut_turns(messages, tokenizer, 160)
        assert all(len(render(piece, tokenizer).token_ids) <= 160 for piece in pieces)
        assert all(piece[0]["role"] == "system" and len(piece) % 2 == 1 for piece in pieces)
        kept = [message for piece in pieces for message in piece[1:]]
        assert len(kept) == len(spoken) - 2 * dropped
        assert kept == [m for m in spoken if m in kept]
        for piece in pieces:
            rendered = render(piece, tokenizer)
            trained = [i for i, t in zip(rendered.token_ids, rendered.loss_mask, strict=True) if t]
            assert tokenizer.decode(trained) == "".join(m["content"] for m in piece if m["role"] == "assistant")


def test_a_file_is_converted_and_what_is_left_out_is_counted(tokenizer, tmp_path, capsys):
    rows = [
        {"id": "long", "conversations": turns(*["word " * 8] * 8)},
        {"id": "huge", "conversations": turns("q", "x" * 500)},
        {"conversations": turns("q", "")},
    ]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="no conversation"):
        convert_sharegpt(tmp_path / "s.json", tokenizer, 5, tmp_path / "none.jsonl")
    verb = ["data", "sharegpt", str(tmp_path / "s.json"), "--tokenizer", str(tokenizer.path), "--tokens", "200"]
    assert main([*verb, "--out", str(tmp_path / "out.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "left out: empty turn" in printed and "exchanges longer than the context" in printed
    written = read_lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in written] == [f"long_{n}" for n in range(len(written))] and len(written) > 1
    (tmp_path / "s.json").write_text('[{"messages": []}]')
    assert main([*verb, "--out", str(tmp_path / "o.jsonl")]) == 1
    assert "conversation 1: a list `conversations`" in capsys.readouterr().err
