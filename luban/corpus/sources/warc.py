"""Web archives: pages of WARC files, texts of WET files (CommonCrawl's formats), by FastWARC."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.core.errors import DataError, MissingExtra
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.sources.html import extract
from luban.corpus.sources.text import LARGEST

PAGES = ("text/html", "application/xhtml+xml")


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """HTML responses with status 200 and converted texts; records that are cut short or unreadable are counted.

    Raises:
        DataError: no record of it is a page with text.
    """
    good = False
    for record in _records(name, context):
        document = _document(record, context)
        if document is not None:
            good = True
            yield document
    if not good:
        raise DataError(f"source {name} holds no page with text")


def _records(name: str, context: SourceContext) -> Iterator[Any]:
    try:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError:
        raise MissingExtra("fastwarc", "corpus", "reading web archives") from None
    with open(Path(name), "rb") as file:
        try:
            yield from ArchiveIterator(file, record_types=WarcRecordType.response | WarcRecordType.conversion)
        except Exception as error:  # FastWARC raises whatever its decompressor does
            context.tally.spoilt("damaged web archives", f"{context.label}: {error}")


def _document(record: Any, context: SourceContext) -> Document | None:
    where = f"{context.label}#{record.stream_pos}"
    http = record.http_headers
    if http is not None and (record.http_content_type not in PAGES or http.status_code != 200):
        context.tally.add("records_that_are_no_pages")
        return None
    try:
        data = record.reader.read(LARGEST)
    except Exception as error:
        context.tally.spoilt("unreadable records", f"{where}: {error}")
        return None
    if len(data) < min(record.content_length, LARGEST):
        context.tally.spoilt("truncated records", f"{where}: {len(data)} of {record.content_length} bytes")
        return None
    if http is None:
        text, title = data.decode("utf-8", "replace"), ""
    else:
        text, title = extract(data, record.http_charset)
    if not text.strip():
        context.tally.add("pages_without_text")
        return None
    meta = {"url": record.headers.get("WARC-Target-URI"), "date": record.headers.get("WARC-Date"), "title": title}
    return Document(id=where, text=text, source=context.label, meta={k: v for k, v in meta.items() if v})
