"""Rows of huge XML files, one at a time; no entity is expanded, so that no file can grow without bound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast
from xml.etree.ElementTree import Element, ParseError, XMLPullParser

from luban.corpus.sources import SourceContext
from luban.corpus.sources.compression import DAMAGED, open_bytes

CHUNK = 1 << 20  # bytes parsed at a time
LARGEST_ELEMENT = 64 << 20  # bytes without the end of an element after which reading stops, to bound memory


def elements(path: Path, tags: tuple[str, ...], context: SourceContext) -> Iterator[Element]:
    """Every element called like one of the tags, whatever its namespace, freed when the next is asked for.

    Damage ends the reading; what came before it stands, and the damage is counted.
    """
    parser = XMLPullParser(("start", "end"))
    open_elements: list[Element] = []
    since = 0  # bytes since an element was handed out
    try:
        with open_bytes(path) as file:
            while data := file.read(CHUNK):
                if b"<!ENTITY" in data:
                    context.tally.spoilt("XML files with entities", context.label)
                    return
                since += len(data)
                if since > LARGEST_ELEMENT:
                    context.tally.spoilt(
                        "oversized XML elements", f"{context.label}: no <{tags[0]}> in {LARGEST_ELEMENT} bytes"
                    )
                    return
                parser.feed(data)
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
        context.tally.spoilt("damaged XML files", f"{context.label}: {error}")


def local(element: Element) -> str:
    """The tag without its namespace."""
    return element.tag.rpartition("}")[2]


def child(element: Element, tag: str) -> Element | None:
    """The first child called `tag`, whatever its namespace."""
    return next((found for found in element if local(found) == tag), None)
