"""Rows of huge XML files, one at a time; no entity is expanded, so that no file can grow without bound."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from xml.etree.ElementTree import Element, ParseError, XMLPullParser

from luban.corpus.sources import SourceContext
from luban.corpus.sources.charsets import REPLACED, codec_of, detect, open_text
from luban.corpus.sources.compression import DAMAGED

CHUNK = 1 << 20  # bytes parsed at a time
LARGEST_ELEMENT = 64 << 20  # characters without the end of an element after which reading stops, to bound memory
ENTITY = "<!ENTITY"
DECLARED = re.compile(rb"""\s*<\?xml\s[^>]*encoding\s*=\s*["']([^"']+)""")


def elements(path: Path, tags: tuple[str, ...], context: SourceContext) -> Iterator[Element]:
    """Every element called like one of the tags, whatever its namespace, freed when the next is asked for.

    Damage ends the reading; what came before it stands, and the damage is counted.
    """
    parser = XMLPullParser(("start", "end"))
    open_elements: list[Element] = []
    since = 0  # characters since an element was handed out
    end = ""  # of the text before
    try:
        for text in _texts(path, context):
            if ENTITY in end + text:
                context.tally.reject("XML files with entities", context.label)
                return
            since, end = since + len(text), (end + text)[-len(ENTITY) :]
            if since > LARGEST_ELEMENT:
                where = f"{context.label}: no <{tags[0]}> in {LARGEST_ELEMENT} characters"
                context.tally.reject("oversized XML elements", where)
                return
            parser.feed(text)
            for event, element in cast("Iterator[tuple[str, Element]]", parser.read_events()):
                if event == "start":
                    open_elements.append(element)
                    continue
                open_elements.pop()
                if local(element) in tags:
                    since = 0
                    yield element
                    if open_elements:
                        open_elements[-1].remove(element)
        parser.close()
    except (*DAMAGED, ParseError) as error:
        context.tally.reject("damaged XML files", f"{context.label}: {error}")


def _texts(path: Path, context: SourceContext) -> Iterator[str]:
    """The file's text in pieces, in whatever encoding it declares; expat itself knows only four of them."""
    with open_text(path) as file:
        data = file.read(CHUNK)
        codec = _codec(data)
        decoder = codecs.getincrementaldecoder(codec)("replace")
        while data:
            text = decoder.decode(data)
            if codec == "utf-8":
                context.tally.add("invalid_utf8_replaced", text.count(REPLACED) - data.count(REPLACED.encode()))
            yield text
            data = file.read(CHUNK)
        yield decoder.decode(b"", True)


def _codec(data: bytes) -> str:
    declared = DECLARED.match(data)  # none behind a byte order mark, whose text has become UTF-8
    label = declared[1].decode("ascii", "replace").lower() if declared else "utf-8"
    codec = "utf-8" if label in ("utf-8", "utf8") else codec_of(label) or detect(data)
    return "utf-8" if codec.startswith("utf-16") else codec


def local(element: Element) -> str:
    """The tag without its namespace."""
    return element.tag.rpartition("}")[2]


def child(element: Element, tag: str) -> Element | None:
    """The first child called `tag`, whatever its namespace."""
    return next((found for found in element if local(found) == tag), None)
