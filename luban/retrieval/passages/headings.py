"""Passages of the sections of Markdown and reStructuredText, titled by their headings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from luban.retrieval.passages import PassageRule, Span
from luban.retrieval.passages.sentences import sentence_spans

HASHES = re.compile(r" {0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$")
UNDERLINE = re.compile(r"([=\-~^\"'`*+#.:_])\1{2,}[ \t]*$")
FENCE = re.compile(r" {0,3}(```+|~~~+)")


@dataclass(frozen=True, kw_only=True)
class Headings(PassageRule):
    """The text under one heading each, titled `Chapter > Section`; longer sections in whole sentences of `length` words."""

    def spans(self, text: str) -> Iterator[Span]:
        for start, stop, title in sections(text):
            for span in sentence_spans(text[start:stop], self.length, self.overlap):
                yield Span(start + span.start, start + span.stop, title)


def sections(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, stop, titles of the enclosing headings joined by ` > `) of the text below each heading; headings themselves
    are in the title alone. Marks inside of fenced code are no headings.
    """
    titles: list[tuple[int, str]] = []  # (level, title) of the headings around the place
    underlines: list[str] = []  # reStructuredText's marks, outermost first, as the text introduces them
    start = at = 0
    fence, before, before_at = "", "", 0
    for line in text.splitlines(keepends=True):
        bare, level, title, begins = line.rstrip("\r\n"), 0, "", at
        if mark := FENCE.match(bare):
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        elif not fence and (found := HASHES.match(bare)):
            level, title = len(found[1]), found[2]
        elif not fence and before.strip() and (found := UNDERLINE.match(bare)) and len(bare) >= len(before.rstrip()):
            if found[1] not in underlines:
                underlines.append(found[1])
            level, title, begins = underlines.index(found[1]) + 1, before.strip(), before_at
        at += len(line)
        if level:
            yield start, begins, " > ".join(name for _, name in titles)
            titles = [*((depth, name) for depth, name in titles if depth < level), (level, title)]
            start = at
        before, before_at = ("" if level else bare), at - len(line)
    yield start, len(text), " > ".join(name for _, name in titles)
