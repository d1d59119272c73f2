"""Web pages, archives, dumps, papers and code trees: the text comes out, the rest stays behind and is counted."""

from __future__ import annotations

import bz2
import gzip
import json

import pytest

from luban.core.errors import DataError
from luban.corpus.licences import of_text
from luban.corpus.sources import find_sources, warc
from luban.corpus.sources.latex import body
from luban.corpus.sources.mediawiki import plain
from luban.corpus.sources.webtext import address
from luban.corpus.tally import Tally

PARAGRAPHS = [
    f"This is paragraph number {i} of the article, and it has enough words to count as the main text." for i in range(4)
]


def page(charset: str = "utf-8", extra: str = "") -> bytes:
    paragraphs = "".join(f"<p>{p}</p>" for p in PARAGRAPHS)
    return (
        f"<html><head><meta charset={charset}><title>The title</title><script>var hidden = 1;</script></head><body>"
        f"<nav><ul><li><a href=/>Home</a><li><a href=/x>Imprint</a></ul></nav><main><article><h1>Head</h1>{paragraphs}"
        f"<p>{extra}</p></article></main><footer>Copyright notice</footer></body></html>"
    ).encode(charset)


def read(name):
    tally = Tally()
    found = [d for source in find_sources([str(name)]) for d in source.documents(tally, 0, 0.0)]
    return found, tally


def test_of_a_page_the_main_text_is_kept(tmp_path):
    (tmp_path / "a.html").write_bytes(page("iso-8859-1", "Größe and café."))
    (found,), _ = read(tmp_path / "a.html")
    assert all(p in found.text for p in PARAGRAPHS) and "Größe and café." in found.text
    assert not any(word in found.text for word in ("Imprint", "Copyright", "hidden"))
    assert found.meta == {"title": "The title"}
    (tmp_path / "b.html").write_bytes(b"<html><body></body></html>")
    with pytest.raises(DataError, match="without text"):
        read(tmp_path / "b.html")


def record(kind: str, url: str, content: bytes, status: str = "200 OK", mime: str = "text/html") -> bytes:
    if kind == "response":
        content = f"HTTP/1.1 {status}\r\nContent-Type: {mime}\r\n\r\n".encode() + content
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nWARC-Date: 2024-01-01T00:00:00Z\r\n"
        f"WARC-Record-ID: <urn:uuid:{abs(hash(url)):032x}>\r\nContent-Length: {len(content)}\r\n"
        f"Content-Type: {'application/http' if kind == 'response' else 'text/plain'}\r\n\r\n"
    )
    return head.encode() + content + b"\r\n\r\n"


RECORDS = [
    record("warcinfo", "", b"software: x"),
    record("response", "http://a.org/1", page()),
    record("response", "http://a.org/gone", page(), "404 Not Found"),
    record("response", "http://a.org/pic", b"\x89PNG\0", mime="image/png"),
    record("response", "http://a.org/2", page(extra="Second.")),
]
NO_PAGES = [  # as crawlers keep them, without HTTP
    record("response", "dns:a.org", b"20240101\na.org. 300 IN A 1.2.3.4").replace(b"application/http", b"text/dns"),
    record("response", "ftp://a.org/x", b"binary").replace(b"application/http", b"application/octet-stream"),
]


@pytest.mark.parametrize("pack", [lambda r: b"".join(r), lambda r: b"".join(map(gzip.compress, r))])
def test_web_archives(tmp_path, pack):
    name = "a.warc.gz" if pack(RECORDS)[:2] == b"\x1f\x8b" else "a.warc"
    (tmp_path / name).write_bytes(pack(RECORDS))
    found, tally = read(tmp_path / name)
    assert [d.meta["url"] for d in found] == ["http://a.org/1", "http://a.org/2"]
    assert PARAGRAPHS[3] in found[0].text and "Second." in found[1].text and "Imprint" not in found[0].text
    assert tally.counts["records_that_are_no_pages"] == 2 and len({d.id for d in found}) == 2


def test_answers_of_dns_and_ftp_are_no_pages_and_long_bodies_are_counted(tmp_path, monkeypatch):
    (tmp_path / "a.warc").write_bytes(b"".join([*NO_PAGES, *RECORDS]))
    found, tally = read(tmp_path / "a.warc")
    assert [d.meta["url"] for d in found] == ["http://a.org/1", "http://a.org/2"]
    assert tally.counts["records_that_are_no_pages"] == 4
    monkeypatch.setattr(warc, "LARGEST", len(page()) + 1)
    found, tally = read(tmp_path / "a.warc")
    assert [d.meta["url"] for d in found] == ["http://a.org/1"] and tally.unusable["oversized records"] == 1


def test_damaged_archives_give_what_comes_before_the_damage(tmp_path):
    members = list(map(gzip.compress, RECORDS))
    (tmp_path / "a.warc.gz").write_bytes(b"".join(members[:4]) + members[4][: len(members[4]) // 2])
    found, tally = read(tmp_path / "a.warc.gz")
    assert [d.meta["url"] for d in found] == ["http://a.org/1"] and tally.unusable["truncated records"] == 1
    texts = [record("conversion", f"http://a.org/{i}", f"Plain text {i} 你好.".encode()) for i in range(3)]
    (tmp_path / "b.wet").write_bytes(b"".join(texts)[:-12])
    found, tally = read(tmp_path / "b.wet")
    assert [d.text for d in found] == ["Plain text 0 你好.", "Plain text 1 你好."]
    assert tally.unusable["truncated records"] == 1
    (tmp_path / "c.warc").write_bytes(b"this is no archive at all")
    with pytest.raises(DataError, match="no page"):
        read(tmp_path / "c.warc")


WIKITEXT = """{{Infobox|name={{nested|x}}}}
'''Luban''' was a [[carpenter|Chinese carpenter]] and [[engineer]].<ref>A source</ref> __TOC__
[[File:Picture.jpg|thumb|A [[caption]] here]]
== Life ==
He built [https://example.org a ladder].<!-- hidden -->
{| class="wikitable"
| cell
|}
[[Category:People]]
"""


def test_wikitext_becomes_plain_text():
    assert plain(WIKITEXT) == "Luban was a Chinese carpenter and engineer.\n\nLife\nHe built a ladder."


def dump(pages: int = 3) -> bytes:
    text = WIKITEXT.replace("&", "&amp;").replace("<", "&lt;")
    body = "".join(
        f"<page><title>T{i}</title><ns>0</ns><id>{i}</id><revision><id>9</id><text>{text}</text></revision></page>"
        for i in range(pages)
    )
    other = (
        "<page><title>Talk:T</title><ns>1</ns><id>90</id><revision><text>chat</text></revision></page>"
        '<page><title>R</title><ns>0</ns><id>91</id><redirect title="T1"/><revision><text>#R</text></revision></page>'
    )
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">{body}{other}</mediawiki>'.encode()


def test_mediawiki_dumps(tmp_path):
    (tmp_path / "xwiki-pages-articles.xml.bz2").write_bytes(bz2.compress(dump()))
    found, tally = read(tmp_path / "xwiki-pages-articles.xml.bz2")
    assert [d.id.split("#")[1] for d in found] == ["0", "1", "2"] and found[0].meta["title"] == "T0"
    assert tally.counts["pages_that_are_no_articles"] == 2
    (tmp_path / "cut.xml").write_bytes(dump()[:-400])
    found, tally = read(f"mediawiki:{tmp_path / 'cut.xml'}")
    assert len(found) >= 2 and tally.unusable["damaged XML files"] == 1
    bomb = b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><mediawiki>&b;</mediawiki>'
    (tmp_path / "bomb.xml").write_bytes(bomb)
    with pytest.raises(DataError, match="no article"):
        read(f"mediawiki:{tmp_path / 'bomb.xml'}")


PAPER = r"""\documentclass{article}
% a comment
\newcommand{\method}{\textsc{Luban}}
\def\cost{$\mathcal{C}_{\method}$}
\newcommand{\two}[2]{#1 and #2}
\begin{document}\maketitle
\begin{abstract}Not kept.\end{abstract}
\section{Introduction}
We present \method, which costs \cost{} at 50\% off. % not this
\begin{comment}
nor this
\end{comment}
\two{a}{b} \methodical
\bibliography{refs}
\end{document}
"""


def test_latex_from_first_section_to_bibliography(tmp_path):
    expected = (
        "\\section{Introduction}\nWe present \\textsc{Luban}, which costs $\\mathcal{C}_{\\textsc{Luban}}${} at 50\\% off. \n\n"
        "\\two{a}{b} \\methodical"
    )
    assert body(PAPER) == expected
    (tmp_path / "a.tex").write_text(PAPER)
    assert read(tmp_path / "a.tex")[0][0].text == expected
    assert body("\\section{A}\n\\newcommand{\\a}{\\a\\a\\a\\a}\n" + "\\a" * 100).count("\\a") < 5000  # no explosion
    assert body("\\newcommand{\\x}{no section here}") == ""


def test_stack_exchange_answers_by_score(tmp_path):
    posts = [
        {
            "Id": "1",
            "PostTypeId": "1",
            "Title": "How?",
            "Body": "&lt;p&gt;Why &lt;code&gt;x&lt;/code&gt;?&lt;/p&gt;",
            "Score": "5",
        },
        {"Id": "2", "PostTypeId": "2", "ParentId": "1", "Body": "&lt;p&gt;Low&lt;/p&gt;", "Score": "-1"},
        {"Id": "3", "PostTypeId": "2", "ParentId": "1", "Body": "&lt;p&gt;High&lt;/p&gt;", "Score": "7"},
        {"Id": "4", "PostTypeId": "1", "Title": "Alone?", "Body": "", "Score": "0"},
        {"Id": "5", "PostTypeId": "2", "ParentId": "1", "Body": "&lt;p&gt;Mid&lt;/p&gt;", "Score": "3"},
    ]
    rows = "".join("<row " + " ".join(f'{k}="{v}"' for k, v in post.items()) + "/>" for post in posts)
    (tmp_path / "Posts.xml").write_text(f"<posts>{rows}</posts>")
    found, _ = read(tmp_path / "Posts.xml")
    assert [d.text for d in found] == [
        "Question: How?\n\nWhy x?\n\nAnswer: High\n\nAnswer: Mid\n\nAnswer: Low",
        "Question: Alone?",
    ]
    assert found[0].meta["answer_scores"] == [7, 3, -1] and found[0].meta["licence"] == "CC-BY-SA-4.0"


MIT = "MIT License\n\nPermission is hereby granted, free of charge, to any\nperson obtaining a copy of this software"
GPL = "GNU GENERAL PUBLIC LICENSE\nVersion 3"


def test_code_by_licence_and_line_length(tmp_path):
    root = tmp_path / "tree"
    files = {
        "LICENSE": MIT,
        "a.py": "def f(x):\n    return x\n",
        "pkg/b.py": "y = 1\n",
        "third/COPYING": GPL,
        "third/c.py": "z = 1\n",
        "long.js": "x" * 1001,
        "wide.js": ("x" * 150 + "\n") * 3,
        "sparse.c": "{}();\n" * 50,
        "notes.bin": "text",
        "empty.py": "",
        "vendor/LICENSE.txt": "unheard of terms",
        "vendor/d.py": "v = 1\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found, tally = read(f"code:{root}")
    assert [(d.id, d.meta["licence"]) for d in found] == [
        ("tree/a.py", "MIT"),
        ("tree/pkg/b.py", "MIT"),
    ]
    dropped = {reason: counts["documents"] for reason, counts in tally.dropped.items()}
    assert dropped == {
        "code: licence GPL": 1,
        "code: licence unknown": 1,
        "code: longest line": 1,
        "code: mean line length": 1,
        "code: letters and digits": 1,
        "code: no source text": 1,
    }


def test_licences_are_told_by_their_words():
    bsd = "Redistribution and use in source and binary forms, with or without modification, are permitted"
    assert of_text(bsd) == "BSD-2-Clause"
    assert of_text(bsd + "\nNeither the name of the copyright holder") == "BSD-3-Clause"
    assert of_text("Apache License\n   Version 2.0, January 2004") == "Apache-2.0"
    assert of_text("all rights reserved") is None


def test_webtext_takes_pages_with_votes_once(tmp_path):
    root = tmp_path / "web"
    root.mkdir()
    posts = [
        ("https://www.a.org/1/", 3),
        ("http://a.org/2", 2),
        ("http://en.wikipedia.org/wiki/X", 90),
        ("http://b.org/?q=1", 5),
    ]
    (root / "links.jsonl").write_text(
        "".join(json.dumps({"url": u, "votes": v}) + "\n" for u, v in posts)
        + "bad\n"
        + '{"url": "u", "votes": 1e999}\n'
        + "[" * 100_000
    )
    pages = [
        ("http://a.org/1#top", "one"),
        ("https://a.org/1", "again"),
        ("http://a.org/2", "two"),
        ("http://en.wikipedia.org/wiki/X", "wiki"),
        ("http://b.org?q=1", "three"),
    ]
    (root / "pages.jsonl").write_text("".join(json.dumps({"url": u, "text": t}) + "\n" for u, t in pages))
    (root / "empty.jsonl").write_text('{"text": "no address", "meta": {"url": 5}}\n')
    (root / "other.jsonl").write_text('{"body": "no text"}\n')
    (root / "more.warc").write_bytes(
        record("response", "http://b.org/?q=1", page()) + record("response", "http://z.org", page())
    )
    found, tally = read(f"webtext:{root}")
    assert [d.meta["url"] for d in found] == ["http://b.org/?q=1", "http://a.org/1#top"]
    assert tally.dropped["webtext: no votes"]["documents"] == 4
    assert tally.unusable["invalid links"] == 3 and tally.unusable["files without documents"] == 1
    assert address("HTTPS://WWW.Example.org:443/a/?b=c#d") == "example.org/a?b=c"
