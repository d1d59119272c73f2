"""Files of every kind with random damage: each gives documents and counts, or one refusal of ours, never another exception."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luban.core.errors import DataError
from luban.corpus.sources import find_sources
from luban.corpus.tally import Tally
from luban.corpus.writer import as_row

for package in ("fastwarc", "resiliparse", "mwparserfromhell", "chardetng_py"):
    pytest.importorskip(package)

SENTENCE = "A paragraph of plain words, é and 字, that stands for a page. "
PAGE = f"<html><head><meta charset=utf-8><title>T</title></head><body><article><p>{SENTENCE * 6}</p></article></body></html>"
ROWS = [
    {"text": SENTENCE, "id": i, "lang": "en", "quality": 0.5, "meta": {"a": [1, None]}, "url": "http://a"}
    for i in range(8)
]
TALK = [
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
]


def warc() -> bytes:
    made = b""
    for head, body in (
        ("Content-Type: text/html; charset=utf-8", PAGE.encode()),
        ("Content-Type: text/html\r\nContent-Encoding: gzip", gzip.compress(PAGE.encode())),
        (
            "Content-Type: text/html\r\nTransfer-Encoding: chunked",
            b"%x\r\n%s\r\n0\r\n\r\n" % (len(PAGE.encode()), PAGE.encode()),
        ),
    ):
        http = f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body
        made += (
            (
                f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a/é\r\nContent-Length: {len(http)}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
                "Content-Type: application/http; msgtype=response\r\n\r\n"
            ).encode()
            + http
            + b"\r\n\r\n"
        )
    return made


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=3)
    return file.getvalue()


WIKI = (
    "<mediawiki><siteinfo><namespaces><namespace key='6'>Datei</namespace></namespaces></siteinfo>"
    + "".join(
        f"<page><title>T{i}</title><ns>0</ns><id>{i}</id><revision><text>'''B''' [[Datei:x|y]] -{{zh-cn:a;zh-tw:b}}- a&lt;br&gt;b {{{{t|x}}}}</text></revision></page>"
        for i in range(3)
    )
    + "</mediawiki>"
).encode()
POSTS = b'<posts><row Id="1" PostTypeId="1" Title="Why?" Body="&lt;p&gt;So&lt;/p&gt;" Score="2"/><row Id="2" PostTypeId="2" ParentId="1" Body="x"/></posts>'
TEX = (
    rb"\documentclass{a}\newcommand{\x}{y}\begin{document}\section{A} \x \url{a%b} \begin{verbatim}%\end{verbatim} text % c"
    + b"\n\\end{document}"
)
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*ROWS, *TALK]).encode()
FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES, preset=0),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.zst": pa.compress(LINES, codec="zstd", asbytes=True),
    "a.json": json.dumps([*ROWS, *TALK]).encode(),
    "a.parquet": parquet(),
    "a.csv": b"text,id,quality\n" + f'"{SENTENCE}",1,0.5\n'.encode() * 5,
    "a.html": PAGE.encode(),
    "a.warc": warc(),
    "a.warc.gz": gzip.compress(warc()),
    "a.xml": WIKI,
    "Posts.xml": POSTS,
    "a.tex": TEX,
    "a.txt": (SENTENCE * 30).encode(),
    "b.txt": (SENTENCE * 30).encode("utf-16"),
    "c.txt": ("这是一个关于自然语言处理的句子。\n" * 30).encode("gb18030"),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The data with some bytes changed, removed, repeated or cut off."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place, size = rng.randrange(len(made) + 1), rng.choice([1, 1, 2, 8, 40])
        kind = rng.randrange(5)
        if kind == 0:
            made[place : place + size] = rng.randbytes(size)
        elif kind == 1:
            del made[place : place + size]
        elif kind == 2:
            made[place:place] = made[place : place + size]
        elif kind == 3:
            made[place:place] = rng.choice(
                [b"\xff", b"\0", b"{", b"[", b'"', b"\\ud800", b"<", b"&", b"\r\n", b"%", b"\x1b$B", b"1e999", b"-{"]
            )
        elif len(made) > 60:
            del made[max(place, 30) :]
    return bytes(made)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_counted_or_refused(tmp_path, name):
    rng = random.Random(name)
    path = tmp_path / name
    for _ in range(10 if name == "Posts.xml" else 40):
        path.write_bytes(damaged(FILES[name], rng))
        tally = Tally()
        try:
            (source,) = find_sources([str(path)])
            for part in source.parts(tally):
                for document in part.documents(tally, 0, 0.0):
                    row = as_row(document)
                    pa.array([row["id"], row["text"], row["lang"], row["messages"], row["meta"]], pa.string())
        except DataError:
            pass
        json.dumps(tally.figures(), allow_nan=False, ensure_ascii=False).encode()
