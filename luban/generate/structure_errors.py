"""What llguidance says of a structure that it can't follow, in plain words and one line."""

from __future__ import annotations

import re

PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): ")  # line and column of a grammar
LISTING = re.compile(r"\n +\d+ \| .*\Z", re.DOTALL)  # the grammar's lines up to the place
HEAD = re.compile(r'invalid regex ".*?" \(in regex\): (?=regex parse error:|lookarounds )', re.DOTALL)
PARSED = re.compile(
    r"regex parse error:\n    (?P<source>.*)\n    (?P<before> *)(?P<mark>\^+)[ ^]*\nerror: (?P<reason>.*)"
)
ASSERTION = re.compile(
    r"lookarounds not supported yet; (\w+?)(Unicode|Ascii|LF|CRLF)?(Negate|StartHalf.*|EndHalf.*)? in .*", re.DOTALL
)
SIGNS = {"Start": "^", "End": "$", "Word": r"\b", "WordNegate": r"\B"}
NOTHING = "NoExtensionBias"  # the state in which no token goes on
SHOWN = 20  # characters of a regular expression


def plain(message: str, kind: str, source: str) -> str:
    """The message in one line.

    Args:
        kind: of `luban.generate.structure.Structure`.
        source: as the structure has it.
    """
    if message.strip() == NOTHING:
        return "it allows no text"
    where, text = "", LISTING.sub("", message)
    if place := PLACE.match(text):
        text = text[place.end() :]
        where = f"line {place[1]}, column {place[2]}: " if kind == "grammar" else ""
    found = HEAD.sub("", text)
    if kind != "regex" and (found != text or PARSED.search(found)):
        where += "in a regex, "
    found = PARSED.sub(lambda match: _wrong(match, source), found)
    found = ASSERTION.sub(_assertion, found)
    return " ".join(f"{where}{found}".split())


def _wrong(match: re.Match[str], source: str) -> str:
    """What is wrong with a regular expression, and at which of its characters."""
    start = len(match["before"])
    shown = match["source"][start : start + max(SHOWN, len(match["mark"]))]
    more = "…" if start + len(shown) < len(match["source"]) else ""
    if not shown:
        return f"{match['reason']}, at its end"
    at = f"character {start + 1}: " if match["source"] == source else ""  # else some are written as two
    return f"{match['reason']}, at {at}{shown}{more}"


def _assertion(match: re.Match[str]) -> str:
    """A sign that says something of the characters around it."""
    sign = SIGNS.get(match[1] + (match[3] or ""), match[1])
    return f"the assertion {sign} is not supported inside of a regex"
