"""Web archives (CommonCrawl's formats), read by FastWARC: HTML pages of WARC files and WET text records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.core.errors import DataError, LubanError, MissingExtra
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.sources.charsets import byte_order_mark, codec_of, page_text
from luban.corpus.sources.compression import open_bytes
from luban.corpus.sources.html import extract
from luban.corpus.sources.http_body import decode_body
from luban.corpus.sources.text import LARGEST, PROBE

PAGES = ("text/html", "application/xhtml+xml")
UNKNOWN_KINDS = ("", "unknown/unknown", "application/unknown", "*/*")
# how a body without a type begins that browsers take for HTML (WHATWG MIME Sniffing, section 7.1)
BEGINS_AS_HTML = re.compile(
    rb"[\t\n\f\r ]*<(?:!--|(?:!doctype html|html|head|script|iframe|h1|div|font|table|a|style|title|b|body|br|p)[ >])",
    re.IGNORECASE,
)
CHARSET = re.compile(r"charset\s*=\s*(.+)", re.IGNORECASE)


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """HTML responses with status 200 (without a type: bodies that browsers take for HTML), and WET text records; records that cannot be read or decoded are counted.

    Raises:
        DataError: no record is a page with text.
    """
    good = False
    for record, converted in _records(name, context):
        document = _document(record, converted, context)
        if document is not None:
            good = True
            yield document
    if not good:
        raise DataError(f"source {name} holds no page with text")


def _records(name: str, context: SourceContext) -> Iterator[tuple[Any, bool]]:
    """FastWARC's records, and whether each holds text that was extracted from a page (WET)."""
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError:
        raise MissingExtra("fastwarc", "corpus", "reading web archives") from None
    path = Path(name)
    unpack = path.suffix.lower() in (".bz2", ".xz")  # gzip, Zstandard and lz4: FastWARC decompresses these
    with open_bytes(path) if unpack else open(path, "rb") as file:
        try:  # HTTP headers are parsed per record, so that a malformed one doesn't end the iteration
            types = WarcRecordType.response | WarcRecordType.conversion
            for record in ArchiveIterator(file, record_types=types, parse_http=False):
                yield record, record.record_type == WarcRecordType.conversion
        except Exception as error:  # FastWARC raises whatever its decompressor does
            context.tally.reject("damaged web archives", f"{context.label}: {error}")


def _document(record: Any, converted: bool, context: SourceContext) -> Document | None:
    """The record's text; None, and counted, if it is unreadable or no page.

    Args:
        converted: a WET record, whose text was extracted from a page.
    """
    where = f"{context.label}#{record.stream_pos}"
    try:
        if record.is_http:
            record.parse_http()
        page = record.http_headers
        if not (converted if page is None else _may_be_page(page)):  # images, but also answers of DNS and FTP
            context.tally.add("records_that_are_no_pages")
            return None
        length = record.content_length
        if length > LARGEST:
            context.tally.reject("oversized records", f"{where}: {length} bytes")
            return None
        data = record.reader.read(LARGEST)
    except Exception as error:
        context.tally.reject("unreadable records", f"{where}: {error}")
        return None
    if len(data) < length:
        context.tally.reject("truncated records", f"{where}: {len(data)} of {length} bytes")
        return None
    try:
        text, title = (page_text(data, "utf-8"), "") if page is None else _page(data, page)
    except NoPage:
        context.tally.add("records_that_are_no_pages")
        return None
    except LubanError:
        raise
    except Exception as error:  # whatever the HTML parser raises: one bad page doesn't stop the archive
        context.tally.reject("pages that cannot be decoded", f"{where}: {error}")
        return None
    if not text.strip():
        context.tally.add("pages_without_text")
        return None
    meta = {"url": record.headers.get("WARC-Target-URI"), "date": record.headers.get("WARC-Date"), "title": title}
    return Document(id=where, text=text, source=context.label, meta={k: v for k, v in meta.items() if v})


class NoPage(ValueError):
    """A body without a stated type that does not begin as HTML does."""


def _kind(headers: Any) -> str:
    """The media type that the headers state, in lower case; empty where they state none."""
    kind = (headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    return "" if kind in UNKNOWN_KINDS else kind


def _may_be_page(headers: Any) -> bool:
    return headers.status_code == 200 and _kind(headers) in ("", *PAGES)


def _page(data: bytes, headers: Any) -> tuple[str, str]:
    """(main text, title). Raises ValueError if the body cannot be decoded or is binary, NoPage if it is not HTML."""
    body = decode_body(data, headers.get("Transfer-Encoding") or "", headers.get("Content-Encoding") or "", LARGEST)
    if not _kind(headers) and not BEGINS_AS_HTML.match(body.removeprefix(b"\xef\xbb\xbf")):
        raise NoPage
    if b"\0" in body[:PROBE] and byte_order_mark(body) is None:
        wide = codec_of(_charset(headers))
        if wide is None or not wide.startswith("utf-16"):
            raise ValueError("the body is binary")
    return extract(body, _charset(headers))


def _charset(headers: Any) -> str | None:
    """The charset parameter of Content-Type, as written; None without one."""
    found = CHARSET.search(headers.get("Content-Type") or "")
    return found[1] if found else None
