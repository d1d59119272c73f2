"""LaTeX as LLaMA reads arXiv (Touvron et al. 2023, section 2.1; Lewkowycz et al. 2022).

What stands before the first section and the bibliography go, comments go, and macros that the author defined
without arguments are expanded; the markup of the text itself stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.sources.text import whole_text

SECTION = re.compile(r"^[ \t]*\\(?:chapter|section|subsection|subsubsection|paragraph)\b\*?", re.MULTILINE)
END = re.compile(r"\\appendix\b|\\begin\{references\}|\\begin\{thebibliography\}|\\bibliography\{|\\printbibliography|"
                 r"\\end\{document\}|\\(?:section|chapter)\*?\{(?:references|bibliography)\}", re.IGNORECASE)  # fmt: skip
WHOLE_COMMENT = re.compile(r"^[ \t]*%.*\n?", re.MULTILINE)
COMMENT = re.compile(r"(?<!\\)((?:\\\\)*)%.*")
COMMENT_BLOCK = re.compile(r"\\begin\{comment\}.*?\\end\{comment\}", re.DOTALL)
MACRO = re.compile(r"\\(?:re|provide)?newcommand\*?\s*\{?\\([A-Za-z@]+)\}?\s*(?=\{)|\\def\s*\\([A-Za-z@]+)\s*(?=\{)")
ROUNDS, GROWTH = 3, 4  # of macros inside macros, and how often the text may grow


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The file as one document. Raises DataError where it has no section with text."""
    text = body(whole_text(Path(name), context))
    if not text:
        raise DataError(f"source {name} is empty: no section with text")
    yield Document(id=context.label, text=text, source=context.label, lang=None)


def body(source: str) -> str:
    """From the first section to the bibliography, without comments, with macros expanded; empty without a section."""
    source = COMMENT_BLOCK.sub("", source)
    source = COMMENT.sub(r"\1", WHOLE_COMMENT.sub("", source))
    macros = _macros(source)
    start = SECTION.search(source)
    if start is None:
        return ""
    source = source[start.start() :]
    end = END.search(source)
    return _expand(source[: end.start()] if end else source, macros).strip()


def _macros(source: str) -> dict[str, str]:
    """Macros without arguments: name → what they stand for."""
    found = {}
    for match in MACRO.finditer(source):
        content = _braced(source, match.end())
        if content is not None:
            found[match[1] or match[2]] = content
    return found


def _braced(source: str, start: int) -> str | None:
    """What stands in the braces that open at `start`."""
    depth = 0
    for place in range(start, min(start + 2000, len(source))):
        if source[place - 1] != "\\":
            depth += (source[place] == "{") - (source[place] == "}")
        if depth == 0:
            return source[start + 1 : place]
    return None


def _expand(text: str, macros: dict[str, str]) -> str:
    if not macros:
        return text
    pattern = re.compile(r"\\(" + "|".join(sorted(map(re.escape, macros), key=len, reverse=True)) + r")(?![A-Za-z@])")
    largest = GROWTH * len(text) + 1000
    for _ in range(ROUNDS):
        expanded = pattern.sub(lambda match: macros[match[1]], text)
        if expanded == text or len(expanded) > largest:
            break
        text = expanded
    return text
