"""Rows: whatever they hold, one is never the end of a build, and conversations are read in every usual shape."""

from __future__ import annotations

import datetime
import decimal
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luban.core.errors import DataError
from luban.corpus.build import build_corpus
from luban.corpus.document import Document, check_messages
from luban.corpus.jsonable import jsonable
from luban.corpus.reader import read_corpus
from luban.corpus.sources import find_sources
from luban.corpus.tally import Tally
from luban.corpus.writer import as_row
from luban.tokenizer.chat import render
from luban.tokenizer.special import ROLES
from luban.tokenizer.tokenizer import load_tokenizer

ANY_ROLE = "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
LONE = "\\udc00"  # as JSON spells a lone surrogate


def build(tmp_path: Path, name: str, **options):
    figures = build_corpus([str(tmp_path / name)], tmp_path / "c", heldout=0.0, bad_share=0.6, **options)
    return list(read_corpus(tmp_path / "c")), figures


@pytest.mark.parametrize(
    "field, expected",
    [
        (f'"id": "{LONE}"', {"id": "a.jsonl#\ufffd"}),
        (f'"lang": "{LONE}"', {"lang": "\ufffd"}),
        (f'"url": "{LONE}"', {"meta": {"url": "\ufffd"}}),
        ('"title": "A name"', {"meta": {"title": "A name"}}),
        (f'"licence": "{LONE}"', {"meta": {"licence": "\ufffd"}}),
        (f'"meta": {{"t": "{LONE}", "{LONE}": [["{LONE}"]]}}', {"meta": {"t": "\ufffd", "\ufffd": [["\ufffd"]]}}),
        ('"meta": {"a": NaN, "b": [Infinity, -Infinity, 1.5]}', {"meta": {"a": None, "b": [None, None, 1.5]}}),
        ('"meta": "{\\"a\\": NaN}"', {"meta": {"a": None}}),
        ('"meta": "{\\"a\\": "', {"meta": None}),
        ('"quality": 1' + "0" * 400, {"quality": None}),
        ('"quality": NaN', {"quality": None}),
        ('"quality": true', {"quality": None}),
        ('"quality": 2', {"quality": 2.0}),
        ('"id": 1' + "0" * 400, {"id": "a.jsonl#1" + "0" * 400}),
        ('"meta": {"n": 1' + "0" * 400 + "}", {"meta": {"n": 10**400}}),
        ('"lang": " EN_us "', {"lang": "en-us"}),
        ('"lang": "zh-Hant"', {"lang": "zh-Hant"}),
        ('"license": "mit"', {"meta": {"licence": "MIT"}}),
    ],
)
def test_odd_values_cost_no_row(tmp_path, field, expected):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "some words here", {field}}}\n{{"text": "other words"}}\n')
    found, figures = build(tmp_path, "a.jsonl")
    assert [d.text for d in found] == ["some words here", "other words"] and not figures["unusable"]
    assert {name: getattr(found[0], name) for name in expected} == expected
    for file in (tmp_path / "c").glob("*.parquet"):
        for meta in pq.read_table(file)["meta"].to_pylist():
            assert (
                meta is None or json.loads(meta, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) or True
            )


@pytest.mark.parametrize(
    "row",
    [
        '{"text": "a", "meta": ' + '{"a":' * 600 + "1" + "}" * 600 + "}",
        '{"text": "a", "meta": "' + "[" * 100_000 + '"}',
        "[" * 100_000,
        '{"text": "a", "id": 1' + "0" * 5000 + "}",
        '{"messages": "' + "[" * 100_000 + '"}',
        '{"text": ["a"]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}',
        '{"messages": []}',
        '{"messages": "no JSON"}',
        '{"messages": [1]}',
        '{"messages": [{"content": "a"}]}',
        '{"text": 3}',
        '{"body": "a"}',
        '{"conversations": [{"from": "nobody", "value": "a"}]}',
        '{"messages": [{"role": "foo", "content": "x"}, {"role": "assistant", "content": "y"}]}',
        f'{{"messages": [{{"role": "{LONE}", "content": "x"}}]}}',
        '{"messages": [{"role": "user", "content": "x"}], "tools": "no JSON"}',
        '{"messages": [{"role": "user", "content": "x"}], "tools": ["f"]}',
        '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
    ],
)
def test_an_unusable_row_is_one_unusable_row(tmp_path, row):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "before"}}\n{row}\n{{"text": "after"}}\n')
    found, figures = build(tmp_path, "a.jsonl")
    assert [d.text for d in found] == ["before", "after"] and sum(figures["unusable"].values()) == 1


def test_empty_rows_are_not_called_unusable(tmp_path):
    rows = ['{"text": ""}', '{"text": null}', '{"text": " \\n"}', '{"messages": [{"role": "user", "content": ""}]}']
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n' + "\n".join(rows))
    found, figures = build(tmp_path, "a.jsonl")
    assert len(found) == 1 and figures["counts"] == {"empty_rows_skipped": 4} and not figures["unusable"]


def test_the_role_or_speaker_that_is_unknown_is_named(tmp_path):
    rows = ['{"messages": [{"role": "foo", "content": "x"}]}', '{"conversations": [{"from": "bar", "value": "x"}]}']
    (tmp_path / "a.jsonl").write_text('{"text": "words"}\n' + "\n".join(rows))
    with pytest.raises(DataError, match="unknown role 'foo' in a conversation \\(known: system,"):
        build_corpus([str(tmp_path / "a.jsonl")], tmp_path / "none", heldout=0.0)
    figures = build_corpus([str(tmp_path / "a.jsonl")], tmp_path / "c", heldout=0.0, bad_share=0.9)
    assert figures["unusable"] == {"rows with unusable messages": 2}
    assert "unknown role 'bar'" in figures["unusable_samples"]["rows with unusable messages"][1]


def test_every_role_that_a_corpus_takes_is_one_that_chat_templates_are_given(tiny_checkpoint):
    """A conversation that a build accepts isn't refused later for its roles."""
    tokenizer = load_tokenizer(tiny_checkpoint / "tokenizer")
    tokenizer.chat_template = ANY_ROLE
    for role in ROLES:
        messages = [{"role": role, "content": "x"}, {"role": "assistant", "content": "y"}]
        assert check_messages(messages) == messages and render(messages, tokenizer).token_ids


Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]


SHAPES = [
    ({"messages": [Q, A]}, [Q, A]),
    ({"messages": json.dumps([Q, A])}, [Q, A]),
    ({"conversations": [Q, A]}, [Q, A]),
    (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [{"role": "system", "content": "s"}, Q, A],
    ),
    ({"conversation": [{"from": "Human", "value": "q"}, {"from": "chatgpt", "value": "a"}]}, [Q, A]),
    (
        {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": CALL}]},
        [Q, {"role": "assistant", "content": None, "tool_calls": CALL}],
    ),
    ({"messages": [{**Q, "name": None}, {**A, "weight": float("nan")}]}, [Q, {**A, "weight": None}]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]}, [Q, A]),
    ({"instruction": "q", "input": "", "output": "a"}, [Q, A]),
    (
        {"instruction": "q", "input": "i", "output": "a", "system": "s"},
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q\n\ni"}, A],
    ),
    ({"instruction": "q", "output": "a", "text": "the text goes before"}, None),
    ({"messages": [{"role": "user", "content": "c\udfff"}]}, [{"role": "user", "content": "c\ufffd"}]),
    ({"messages": [Q, {"role": "assistant", "content": "a", "tool_calls": []}]}, [Q, {**A, "tool_calls": []}]),
]
ONLY_JSON = ("\\ud", '"type": "text"')  # Arrow holds no lone surrogates, and no column of texts and lists
CASES = [
    (ending, row, messages)
    for ending in ("jsonl", "json", "parquet")
    for row, messages in SHAPES
    if ending != "parquet" or not any(word in json.dumps(row) for word in ONLY_JSON)
]


@pytest.mark.parametrize("ending, row, messages", CASES)
def test_conversations_in_every_usual_shape(tmp_path, ending, row, messages):
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        path.write_text(json.dumps([row] if ending == "json" else row))
    found, figures = build(tmp_path, path.name)
    expected = "\n".join(m["content"] for m in messages if m["content"] is not None) if messages else row["text"]
    assert [(d.messages, d.text) for d in found] == [(messages, expected)] and not figures["unusable"]


def test_a_named_text_field(tmp_path):
    rows = [
        {"content": "one", "text": "not this"},
        {"content": [Q, A]},
        {"content": ""},
        {"text": "x", "messages": [Q]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, figures = build(tmp_path, "a.jsonl", text_field="content")
    assert [(d.text, d.messages) for d in found] == [("one", None), ("q\na", [Q, A])]
    assert figures["unusable"] == {"rows without 'content' or 'messages'": 1}
    pq.write_table(pa.table({"content": ["one", "two"], "text": ["x", "y"]}), tmp_path / "b.parquet")
    (tmp_path / "c.csv").write_text("id,content\n1,one\n2,two\n")
    (tmp_path / "d.json").write_text(json.dumps([{"content": "one"}, {"content": "two"}]))
    for name in ("b.parquet", "c.csv", "d.json"):
        (source,) = find_sources([str(tmp_path / name)], "content")
        assert [d.text for part in source.parts(Tally()) for d in part.documents(Tally(), 0, 0.0)] == ["one", "two"]
        with pytest.raises(DataError, match=r"'texts' or 'messages', only .*content.*; --text-field NAME"):
            (source,) = find_sources([str(tmp_path / name)], "texts")
            list(source.documents(Tally(), 0, 0.0))


def test_parquet_values_that_json_cannot_hold(tmp_path):
    moment = datetime.datetime(2024, 1, 1, 12, tzinfo=datetime.UTC)
    metas = [
        {
            "t": moment,
            "b": b"\xff\x00",
            "u": "é".encode(),
            "d": decimal.Decimal("1.50"),
            "n": float("nan"),
            "day": datetime.date(2024, 2, 29),
            "l": [b"\xfe"],
            "s": datetime.timedelta(seconds=90),
        }
    ]
    pq.write_table(
        pa.table({"text": ["words"], "meta": metas, "url": ["http://a"], "license": ["mit"]}), tmp_path / "a.parquet"
    )
    found, _ = build(tmp_path, "a.parquet")
    assert found[0].meta == {
        "t": "2024-01-01T12:00:00+00:00",
        "b": "/wA=",
        "u": "é",
        "d": "1.50",
        "n": None,
        "day": "2024-02-29",
        "l": ["/g=="],
        "s": "0:01:30",
        "url": "http://a",
        "licence": "MIT",
    }


def test_parquet_values_that_python_cannot_hold(tmp_path):
    far = pa.array([0, 10**18, 5], pa.int64()).cast(pa.timestamp("ms"))  # the second lies beyond the year 9999
    good = pa.array([b"one", b"two", b"\xff\xfe three"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, good.buffers())  # Parquet does not check that strings are UTF-8
    meta = pa.StructArray.from_arrays([far], ["when"])
    pq.write_table(pa.table({"text": text, "meta": meta}), tmp_path / "a.parquet")
    found, figures = build(tmp_path, "a.parquet")
    assert [(d.text, d.id, d.meta) for d in found] == [
        ("one", "a.parquet#000000000", {"when": "1970-01-01T00:00:00"}),
        ("two", "a.parquet#000000001", None),
    ]
    assert figures["unusable"] == {"unreadable rows": 1} and figures["counts"] == {"unreadable_cells_dropped": 1}


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_row_group_costs_itself_alone(tmp_path, seed):
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abcdefgh ", k=200)) + str(i) for i in range(600)]
    pq.write_table(
        pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100, use_dictionary=False, compression="zstd"
    )
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(2).column(0)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 200] = rng.randbytes(200)
    (tmp_path / "a.parquet").write_bytes(data)
    found, figures = build(tmp_path, "a.parquet")
    assert [d.text for d in found] == texts[:200] + texts[300:]
    assert [d.id for d in found][200] == "a.parquet#000000300"
    assert figures["unusable"] == {"damaged Parquet row groups": 1}


def test_file_names_that_are_no_utf8(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"caf\xe8.txt", b"d\xff.jsonl"):
        with open(bytes(folder) + b"/" + name, "w") as file:
            file.write('{"text": "a row"}' if name.endswith(b"jsonl") else f"text of {name!r}")
    with open(bytes(folder) + b"/bad\xff.parquet", "w") as file:
        file.write("no Parquet")
    found, figures = build(tmp_path, "in")
    assert [d.id for d in found] == ["in/caf\\xe8.txt", "in/caf\\xe9.txt", "in/d\\xff.jsonl#000000000"]
    assert figures["unusable"] == {"files without documents": 1} and (tmp_path / "c" / "README.md").is_file()
    import os

    alone = os.fsdecode(bytes(folder) + b"/caf\xe9.txt")
    build_corpus([alone], tmp_path / "d", heldout=0.0, workers=1)
    assert [d.id for d in read_corpus(tmp_path / "d")] == ["caf\\xe9.txt"]


def test_what_steps_note_is_valid_json():
    row = as_row(Document(id="a", text="b", source="s", meta={"perplexity": float("inf")}))
    assert row["meta"] == '{"perplexity": null}'


def test_any_value_becomes_json():
    rng = random.Random(7)

    def value(depth: int):
        kinds = [None, True, rng.randint(-9, 9), rng.random(), float("nan"), "\ud83d", b"\xff", {1, 2}, (1,), object()]
        if depth and rng.random() < 0.6:
            return {rng.choice(["a", 1, None, "\udc00"]): value(depth - 1) for _ in range(3)}
        return [value(depth - 1) for _ in range(3)] if depth else rng.choice(kinds)

    for _ in range(200):
        json.dumps(jsonable(value(3)), allow_nan=False, ensure_ascii=False).encode()
