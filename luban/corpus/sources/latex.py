"""LaTeX as LLaMA reads arXiv (Touvron et al. 2023, section 2.1; Lewkowycz et al. 2022).

What stands before the first section and the bibliography go, comments go, and macros that the author defined
without arguments are expanded; the markup of the text itself stays. Verbatim text and addresses, in which `%` is no
comment and a command is none, stay as they are. Departure: a letter or an included file without sections is read, too.
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
END = re.compile(
    r"\\appendix\b|\\begin\{references\}|\\begin\{thebibliography\}|\\bibliography\{|\\printbibliography|"
    r"\\end\{document\}|\\(?:section|chapter)\*?\{(?:references|bibliography)\}",
    re.IGNORECASE,
)
DOCUMENT, PREAMBLE = re.compile(r"\\begin\s*\{document\}"), re.compile(r"\\document(?:class|style)\b")
TITLE = re.compile(r"\\maketitle\b|\\end\s*\{(?:abstract|frontmatter|titlepage)\}")
SENTENCE = re.compile(r"^[ \t]*[^\W\d_]\w*,?[ \t]+\S+[ \t]+\S+", re.MULTILINE)  # three words at the beginning of a line
TOKEN = re.compile(
    r"""
      (?P<dropped> \\begin\{comment\} .*? (?: \\end\{comment\} | \Z )
                 | ^[ \t]*%[^\n]*\n?                                       # a line that is nothing but a comment
                 | %[^\n]* )
    | (?P<kept> \\begin\{ (?P<name> (?:[BL]?[Vv]erbatim|lstlisting|minted|alltt|filecontents)\*? ) \}
                  .*? (?: \\end\{(?P=name)\} | \Z )
              | \\(?: verb\*? | (?:lstinline|path)(?:\[[^\]\n]{0,300}\])? ) (?P<quote> [^\sA-Za-z*{\[\\] ) [^\n]*? (?P=quote)
              | \\(?: url | nolinkurl | href | path | lstinline(?:\[[^\]\n]{0,300}\])? | mintinline\{\w+\} ) \s*
                  \{ (?: [^{}\\] | \\. | \{[^{}]*\} )* \} )
    | \\.                                                                 # an escaped sign, such as a percent sign
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
HIDDEN = "\ufdd0{}\ufdd1"  # stands for what is kept as it is; Unicode assigns these characters to no text
PLACE = re.compile("\ufdd0([0-9]+)\ufdd1")
MACRO = re.compile(r"\\(?:re|provide)?newcommand\*?\s*\{?\\([A-Za-z@]+)\}?\s*(?=\{)|\\def\s*\\([A-Za-z@]+)\s*(?=\{)")
ROUNDS, GROWTH = 3, 4  # of macros inside macros, and how often the text may grow


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The file as one document. Raises DataError where it holds no text, as a file of macros does."""
    text = body(whole_text(Path(name), context))
    if not text:
        raise DataError(f"source {name} is empty: no section with text")
    yield Document(id=context.label, text=text, source=context.label, lang=None)


def body(source: str) -> str:
    """The text from the first section to the bibliography, without comments, with macros expanded.

    Without a section it begins behind the title and abstract, or with the file where that is no document of its own.
    """
    kept: list[str] = []

    def hide(match: re.Match[str]) -> str:
        if match["dropped"] is not None:
            return ""
        if match["kept"] is None:
            return match[0]
        kept.append(match[0])
        return HIDDEN.format(len(kept) - 1)

    source = TOKEN.sub(hide, PLACE.sub("", source))
    macros = _macros(source)
    start = SECTION.search(source)
    source = source[start.start() :] if start else _without_sections(source)
    end = END.search(source)
    text = _expand(source[: end.start()] if end else source, macros)
    return PLACE.sub(lambda match: kept[int(match[1])], text).strip()


def _without_sections(source: str) -> str:
    """The text after the title, or the whole of a file that is part of a document; empty if it isn't prose."""
    document = DOCUMENT.search(source)
    if document is None:
        return source if SENTENCE.search(source) and not PREAMBLE.search(source) else ""
    source = source[document.end() :]
    title = max((match.end() for match in TITLE.finditer(source)), default=0)
    return source[title:]


def _macros(source: str) -> dict[str, str]:
    """Macros without arguments: name → what they stand for."""
    found = {}
    for match in MACRO.finditer(source):
        content = _braced(source, match.end())
        if content is not None:
            found[match[1] or match[2]] = content
    return found


def _braced(source: str, start: int) -> str | None:
    """The content of the braces that open at `start`."""
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
