"""Charsets and HTTP codings of web archives, as servers really declare them: the text is right or the page is counted."""

from __future__ import annotations

import codecs
import gzip
import random
import zlib

import pyarrow as pa
import pytest
import webencodings  # an independent table of the standard's labels

from luban.corpus.sources import find_sources
from luban.corpus.sources.charsets import codec_of, page_text
from luban.corpus.sources.http_body import decode_body
from luban.corpus.tally import Tally

brotli = pytest.importorskip("brotli")
pytest.importorskip("fastwarc")
pytest.importorskip("resiliparse")

SENTENCE = "A paragraph of plain English words that stands for a page. "
MOST = 1 << 20


def page(body: str = SENTENCE * 6) -> str:
    return f"<html><body><article><p>{body}</p></article></body></html>"


def record(head: str, body: bytes) -> bytes:
    http = f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode() + body
    return (
        (
            f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://h.example/a\r\nContent-Length: {len(http)}\r\n"
            "WARC-Date: 2024-01-01T00:00:00Z\r\nWARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-000000000001>\r\n"
            "Content-Type: application/http; msgtype=response\r\n\r\n"
        ).encode()
        + http
        + b"\r\n\r\n"
    )


def read(tmp_path, *records: bytes):
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    tally = Tally()
    (source,) = find_sources([str(tmp_path / "a.warc")])
    return list(source.documents(tally, 0, 0.0)), tally


def chunked(body: bytes, rng: random.Random) -> bytes:
    made, start = b"", 0
    while start < len(body):
        size = rng.randint(1, 300)
        part = body[start : start + size]
        made += f"{len(part):{rng.choice('xX')}}{rng.choice(['', ';name=value', ' '])}\r\n".encode() + part + b"\r\n"
        start += size
    return made + b"0\r\nTrailer: x\r\n\r\n"


def bare_deflate(body: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(body) + stream.flush()


def two_members(body: bytes) -> bytes:
    return gzip.compress(body[: len(body) // 2]) + gzip.compress(body[len(body) // 2 :])


def zstd(body: bytes) -> bytes:
    return pa.compress(body, codec="zstd", asbytes=True)


CODINGS = {
    "gzip": gzip.compress,
    "x-gzip": two_members,
    "deflate": zlib.compress,
    "Deflate": bare_deflate,
    "br": brotli.compress,
    "zstd": zstd,
    "identity": bytes,
}


@pytest.mark.parametrize(
    "kind",
    [
        "text/html; charset=" + label
        for label in ("utf8mb4", "none", "unicode", "x-sjis", "UTF-8,text/html", '"utf-8"', "", "'x'")
    ]
    + ["TEXT/HTML", "Text/Html;Charset=UTF-8", "application/xhtml+xml ; CHARSET = utf8"],
)
def test_an_odd_content_type_costs_no_page(tmp_path, kind):
    found, tally = read(tmp_path, record(f"Content-Type: {kind}", page().encode()))
    assert [d.text.count("paragraph of plain English words") for d in found] == [6] and not tally.unusable


TEXTS = {  # label → (codec that browsers use for it, text that a narrower codec of this name cannot hold)
    "iso-8859-1": ("cp1252", "It’s a “smart” quote – in a café. "),
    "latin1": ("cp1252", "€ 20 für Größe. "),
    "us-ascii": ("cp1252", "naïve “quotes” here. "),
    "iso-8859-9": ("cp1254", "Şişli’de “güzel” bir gün. "),
    "gb2312": ("gb18030", "镕基说話㐀。这是一个句子。"),
    "GBK": ("gb18030", "这是一个句子,有€和𠀀。"),
    "big5": ("big5hkscs", "這是一個句子,啲嘢。"),
    "x-sjis": ("cp932", "①日本語の文章です～。"),
    "euc-jp": ("euc_jp", "日本語の文章です。"),
    "ks_c_5601-1987": ("cp949", "뷁 한국어 문장입니다. "),
    "windows-1251": ("cp1251", "Это предложение. "),
    "koi8-r": ("koi8-r", "Это предложение. "),
    "tis-620": ("cp874", "“นี่คือประโยค” "),
    "utf-16": ("utf-16-le", "words 字 here. "),
    "unicode-1-1-utf-8": ("utf-8", "字 and é. "),
}


@pytest.mark.parametrize("label", TEXTS)
@pytest.mark.parametrize("where", ["header", "meta"])
def test_labels_mean_what_they_mean_to_browsers(tmp_path, label, where):
    codec, text = TEXTS[label]
    if where == "header":
        found, _ = read(tmp_path, record(f"Content-Type: text/html; charset={label}", page(text * 8).encode(codec)))
    else:
        if label == "utf-16":
            codec = "utf-8"  # a label that was read as ASCII cannot be right
        data = page(text * 8).replace("<body>", f"<head><meta charset={label}></head><body>").encode(codec)
        found, _ = read(tmp_path, record("Content-Type: text/html", data))
    assert found[0].text.count(text.strip()) == 8


def test_labels_are_those_of_the_standard():
    for label, name in webencodings.LABELS.items():
        codec = codec_of(f" {label.upper()} ")
        if name in ("replacement", "x-user-defined", "x-mac-cyrillic"):
            assert codec is None  # the encoding is detected instead
            continue
        reference = webencodings.lookup(label).codec_info
        sample = bytes(range(0x20, 0x7F)) + (b"" if "16" in name or name.startswith("iso-2022") else b"\xc4\xe3\n")
        expected, _ = reference.decode(sample, "replace")
        assert codec is not None and (codecs.decode(sample, codec, "replace") == expected or "16" in name), label


def test_a_wrong_label_loses_against_the_bytes():
    german = page("Größe, Äpfel und Öl weiß man schön zu schätzen, über Bäume. " * 20)
    assert page_text(german.encode("cp1252"), "utf-8") == german
    assert page_text(codecs.BOM_UTF8 + german.encode(), "iso-8859-1") == german
    assert page_text(codecs.BOM_UTF16_BE + german.encode("utf-16-be"), "utf-8") == german
    assert page_text(german.encode(), "utf-16") == german
    broken = german.encode().replace("Größe".encode(), b"Gr\xf6\xdfe", 1)  # two bytes of 1,600 are no UTF-8
    assert page_text(broken, "utf-8") == german.replace("Größe", "Gr\ufffd\ufffde", 1)
    chinese = page("这是一个关于自然语言处理的句子。" * 20)
    assert page_text(chinese.encode("gb18030"), "utf8mb4") == page_text(chinese.encode("gb18030"), "utf-8") == chinese


def test_local_pages_with_an_unknown_label_are_read(tmp_path):
    (tmp_path / "a.html").write_bytes(page("Größe. " * 9).replace("<body>", "<meta charset=utf8mb4><body>").encode())
    (source,) = find_sources([str(tmp_path / "a.html")])
    assert next(source.documents(Tally(), 0, 0.0)).text.count("Größe.") == 9


@pytest.mark.parametrize("seed", range(3))
def test_every_coding_and_chains_of_them(tmp_path, seed):
    rng = random.Random(seed)
    body = page("".join(rng.choices("abcdefgh 字é.", k=rng.randint(200, 5000)))).encode()
    for name, encode in CODINGS.items():
        assert decode_body(encode(body), "", name, MOST) == body
        assert decode_body(chunked(encode(body), rng), "chunked", name, MOST) == body
        assert decode_body(chunked(encode(body), rng), f"{name}, chunked", "", MOST) == body
        for second, again in CODINGS.items():
            assert decode_body(again(encode(body)), "", f"{name}, {second}", MOST) == body
        assert decode_body(encode(body), "", name, 100)[:100] == body[:100]
    assert decode_body(gzip.compress(body), "", "", MOST) == decode_body(zstd(body), "", "", MOST) == body
    assert decode_body(gzip.compress(body) + b"padding", "", "gzip", MOST) == body


@pytest.mark.parametrize(
    "transfer, content",
    [
        ("chunked", ""),
        ("", "gzip"),
        ("", "br"),
        ("", "deflate"),
        ("", "zstd"),
        ("chunked", "gzip"),
        ("", "UTF-8"),
        ("", "foo"),
    ],
)
def test_a_body_that_was_decoded_before_stands_as_it_is(transfer, content):
    assert decode_body(page().encode(), transfer, content, MOST) == page().encode()


def test_what_cannot_be_decoded_is_counted_and_the_next_page_is_read(tmp_path):
    body, noise = page("".join(random.Random(1).choices("abcdefgh ", k=3000))).encode(), bytes(range(256)) * 4
    bad = [
        record(f"Content-Type: text/html\r\n{head}", data)
        for head, data in (
            ("Content-Encoding: gzip", gzip.compress(body)[:300]),
            ("Content-Encoding: br", brotli.compress(body)[:300]),
            ("Content-Encoding: zstd", zstd(body)[:300]),
            ("Content-Encoding: deflate", b"no deflate at all"),
            ("Transfer-Encoding: chunked", b"fff\r\n" + body[:50]),
            ("Content-Encoding: foo", noise),
            ("X: y", noise),
            ("Content-Encoding: gzip", gzip.compress(noise)),
            ("X: y", gzip.compress(body)[:300]),
        )
    ]
    good = record(
        "Content-Type: text/html\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip",
        chunked(gzip.compress(page().encode()), random.Random(2)),
    )
    found, tally = read(tmp_path, *[part for one in bad for part in (one, good)])
    assert len(found) == 9 and all(d.text.count("plain English words") == 6 for d in found)
    assert tally.unusable == {"pages that cannot be decoded": 9}


def test_a_malformed_http_header_ends_nothing(tmp_path):
    broken = record("Content-Type: text/html", page().encode()).replace(b"HTTP/1.1 200 OK", b"HTTP/1.1 2OO \xff")
    found, _ = read(tmp_path, broken, record("Content-Type: text/html", page().encode()))
    assert len(found) == 1


@pytest.mark.parametrize("head", ["X: y", "Content-Type:", "Content-Type: unknown/unknown", "Content-Type: */*; a=b"])
@pytest.mark.parametrize(
    ("before", "is_page"),
    [
        ("", True),
        ("\ufeff\r\n  <!DOCTYPE html>", True),
        ("<!-- a remark -->", True),
        ("<Title >t</title>", True),
        ("plain words first ", False),
        ("<?xml version='1.0'?>", False),
        ("<article>", False),
    ],
)
def test_a_body_without_a_type_is_a_page_where_browsers_take_it_for_one(tmp_path, head, before, is_page):
    body = gzip.compress((before + page()).encode())
    documents, tally = read(
        tmp_path, record(f"{head}\r\nContent-Encoding: gzip", body), record("Content-Type: text/html", page().encode())
    )
    assert len(documents) == 1 + is_page and tally.counts.get("records_that_are_no_pages", 0) == (not is_page)
    assert not tally.unusable and all(SENTENCE.strip() in d.text for d in documents)
