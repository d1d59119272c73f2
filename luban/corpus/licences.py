"""Licences as SPDX expressions (SPDX specification 2.3, annex D), and their detection in licence texts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise

NAMES = (
    "0BSD",
    "AGPL-3.0-only",
    "AGPL-3.0-or-later",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "Artistic-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC-BY-NC-4.0",
    "CC-BY-NC-SA-4.0",
    "CC-BY-NC-ND-4.0",
    "CC-BY-ND-4.0",
    "EPL-2.0",
    "GPL-2.0-only",
    "GPL-2.0-or-later",
    "GPL-3.0-only",
    "GPL-3.0-or-later",
    "ISC",
    "LGPL-2.1-only",
    "LGPL-2.1-or-later",
    "LGPL-3.0-only",
    "LGPL-3.0-or-later",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "MPL-2.0",
    "ODC-By-1.0",
    "PSF-2.0",
    "Python-2.0",
    "Unlicense",
    "Zlib",
    "research-only",
    "proprietary",
    "no-export",
)
SPELT = {name.lower(): name for name in NAMES} | {"cc0": "CC0-1.0", "apache 2.0": "Apache-2.0", "apache2": "Apache-2.0"}
AND, OR = " AND ", " OR "
PHRASES = (
    ("Apache-2.0", r"apache license,?\s+version 2\.0"),
    ("GPL", r"gnu (?:lesser |affero )?general public license"),
    ("MPL-2.0", r"mozilla public license"),
    ("MIT", r"permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("ISC", r"permission to use, copy, modify, and(?:/or)? distribute this software for any purpose"),
    ("BSD-3-Clause", r"redistribution and use in source and binary forms.*neither the name"),
    ("BSD-2-Clause", r"redistribution and use in source and binary forms"),
    ("Unlicense", r"this is free and unencumbered software"),
    ("CC0-1.0", r"cc0 1\.0 universal"),
)
_BY = r"(?:creative commons attribution|cc[- ]by)"
NAMED = (  # how a sentence about a work names its licence; the first that matches at a place counts
    ("Apache-2.0", r"apache(?: software)?(?: licen[cs]e)?,?[ -](?:version |v)?2(?:\.0)?"),
    ("MIT", r"(?:mit|expat)(?:/x11|/expat)?(?: licen[cs]e)?"),
    ("0BSD", r"0bsd|zero[- ]clause bsd"),
    ("BSD-2-Clause", r"(?:bsd[- ]2[- ]clause|(?:2[- ]clause|two[- ]clause|simplified) bsd)(?: licen[cs]e)?"),
    (
        "BSD-3-Clause",
        r"(?:bsd[- ]3[- ]clause|(?:3[- ]clause|three[- ]clause|new|modified|revised) bsd)(?: licen[cs]e)?",
    ),
    (
        "GPL",
        r"gnu (?:lesser |library |affero )?(?:general public licen[cs]e|[al]?gpl)|[al]?gpl(?:[- ]?v?[0-9][0-9.]*)?",
    ),
    ("MPL-2.0", r"mozilla public licen[cs]e|mpl[- ](?:version |v)?2(?:\.0)?"),
    ("ISC", r"isc(?: licen[cs]e)?"),
    ("BSL-1.0", r"boost software licen[cs]e"),
    ("PSF-2.0", r"(?:psf|python software foundation) licen[cs]e"),
    ("Zlib", r"zlib(?: licen[cs]e)?"),
    ("Unlicense", r"(?:the )?unlicen[cs]e"),
    ("CC0-1.0", r"cc0(?:[- ]1\.0)?|creative commons zero"),
    ("CC-BY-NC-SA-4.0", rf"{_BY}[- ](?:nc|noncommercial)[- ](?:sa|sharealike)[- ]4\.0"),
    ("CC-BY-NC-ND-4.0", rf"{_BY}[- ](?:nc|noncommercial)[- ](?:nd|noderivatives|noderivs)[- ]4\.0"),
    ("CC-BY-NC-4.0", rf"{_BY}[- ](?:nc|noncommercial)[- ]4\.0"),
    ("CC-BY-SA-4.0", rf"{_BY}[- ](?:sa|sharealike)[- ]4\.0"),
    ("CC-BY-ND-4.0", rf"{_BY}[- ](?:nd|noderivatives|noderivs)[- ]4\.0"),
    ("CC-BY-4.0", rf"{_BY}[- ]4\.0"),
)
_NAME = "|".join(f"(?P<n{i}>{pattern})" for i, (_, pattern) in enumerate(NAMED))
NAME = re.compile(rf"(?<![\w.-])(?:{_NAME})(?![\w-])")
# "licensed under the … license", "License: …", "__license__ = …": what follows up to the sentence's end is looked at
STATED = re.compile(
    r"(?:(?:licen[cs]ed|released|distributed|redistributed|available|published|provided|covered|governed|free software)"
    r" (?:\w+ ){0,4}?(?:under|by)|(?<![\w-])_*licen[cs]e_*\"? ?[:=]|@licen[cs]e) (?P<rest>.{1,240}?)(?:\. |[;{}]|$)"
)
FAMILIES = ("GPL",)  # names that are not SPDX's: of texts that don't say which licence of a family they mean
LONGEST_NAME = 100  # characters of an expression
HEADER = 4096  # characters of a source file in which its licence stands
TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([^\r\n]+)")
EXPRESSION = re.compile(r"\(?[A-Za-z0-9.+-]+(?:[ \t]+(?:AND|OR|WITH)[ \t]+\(?[A-Za-z0-9.+-]+\)?)*\)?")
COMMENT_MARK = re.compile(r"^[ \t]*(?://+|/?\*+/?|#+|--+|;+|%+|!+|<!--|\"\"\"|''')?", re.MULTILINE)


@lru_cache(maxsize=1024)
def spdx(expression: str) -> str:
    """The expression with the names of known licences in SPDX's spelling, which knows no case.

    A whole licence text is identified by its words; an unknown one is shortened.
    """
    if len(expression) > LONGEST_NAME:
        return of_text(expression) or " ".join(expression.split())[:LONGEST_NAME] + "…"
    words = re.split(r"( AND | OR |[()])", " ".join(expression.split()), flags=re.IGNORECASE)
    joined = "".join(SPELT.get(word.strip().lower(), word) if word.strip("() ") else word for word in words)
    return re.sub(r" (and|or) ", lambda match: match[0].upper(), joined)


def all_of(expressions: Iterable[str]) -> str:
    """One expression for a work to which every one of these applies, empty where there are none."""
    names = dict.fromkeys(filter(None, map(spdx, expressions)))
    return AND.join(f"({name})" if OR in name and len(names) > 1 else name for name in names)


def any_of(expressions: Iterable[str]) -> str:
    """One expression for a work under any one of these, as the user chooses."""
    return OR.join(dict.fromkeys(map(spdx, expressions)))


def parts(expression: str) -> list[str]:
    """The operands of an expression's AND: all of them bind users of the work."""
    depth, found, start = 0, [], 0
    for match in re.finditer(r"[()]| AND ", expression):
        depth += (match[0] == "(") - (match[0] == ")")
        if match[0] == AND and depth == 0:
            found.append(expression[start : match.start()])
            start = match.end()
    found.append(expression[start:])
    return [name[1:-1] if name.startswith("(") and name.endswith(")") else name for name in found]


def permitted(expression: str, allowed: Iterable[str]) -> bool:
    """True if a work under the expression can be used under allowed licences alone."""
    names = frozenset(allowed)
    return all(any(name.strip("() ") in names for name in part.split(OR)) for part in parts(expression))


def of_text(text: str) -> str | None:
    """The licence whose words stand in a text, or None."""
    folded = " ".join(COMMENT_MARK.sub("", text).lower().split())
    return next((name for name, phrase in PHRASES if re.search(phrase, folded)), None)


def of_words(text: str) -> str | None:
    """The licence of a text in words: the one that it states, and the one whose own text stands in it."""
    named, quoted = stated(text), of_text(text)
    if named and quoted and quoted not in re.split(r" AND | OR |[()]", named):
        return all_of([named, quoted])
    return named or quoted


def stated(text: str) -> str | None:
    """The licence that sentences such as "licensed under the BSD 3-Clause License" name, or None.

    Names joined by `or` are a choice; of several sentences and otherwise, all apply.
    """
    found = []
    for sentence in STATED.finditer(" ".join(COMMENT_MARK.sub("", text).lower().split())):
        rest = sentence["rest"]
        matches = list(NAME.finditer(rest))
        names = [NAMED[int((match.lastgroup or "n0")[1:])][0] for match in matches]
        between = [rest[one.end() : two.start()] for one, two in pairwise(matches)]
        choice = all(re.search(r"\bor\b|/", words) for words in between)
        found.append(any_of(names) if choice else all_of(names))
    return all_of(found) or None


def unknown_names(expression: str) -> list[str]:
    """The operands of an expression that are neither on SPDX's list, nor a `LicenseRef-…`, nor one of NAMES."""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    found = []
    for operand in re.split(r" AND | OR |[()]", expression, flags=re.IGNORECASE):
        name = operand.strip()
        if not name or name.lower() in SPELT or name in FAMILIES:
            continue
        try:
            canonicalize_license_expression(name)
        except InvalidLicenseExpression:
            found.append(name)
    return found


def of_source_file(text: str, prose: bool = False) -> str | None:
    """The licence that a source file names at its beginning, by SPDX's tags (all apply) or its words, or None.

    Args:
        prose: the file is documentation, whose words may be about any licence; only its tags count.
    """
    tags = (EXPRESSION.match(tag.strip()) for tag in TAG.findall(text[:HEADER]))
    return all_of(tag[0] for tag in tags if tag) or (None if prose else of_words(text[:HEADER]))
