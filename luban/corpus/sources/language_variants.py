"""MediaWiki's language conversion, `-{zh-hans:…; zh-hant:…}-`: one of the variants is kept.

Which one is shown depends on the reader; here it is simplified Chinese where there is such a variant, else the first. The
step `chinese` converts whole texts. Source: MediaWiki, "Writing systems/Syntax".
"""

from __future__ import annotations

import re

MARKUP = re.compile(r"-\{(?!\{)((?:(?!-\{|\}-).)*)\}-", re.DOTALL)  # the innermost, so that nested ones go one by one
CODE = r"[a-z]{2,3}(?:-[a-z]{2,8})*"
FLAGS = re.compile(rf"\s*(?:[ADHNRST+-]|{CODE})(?:\s*;\s*(?:[ADHNRST+-]|{CODE}))*\s*")
SILENT = frozenset("DHST-")  # flags of what shows nothing here: rules for the rest of the page, its title, descriptions
RULES = re.compile(rf";\s*(?=(?:[^;:=]*=>)?\s*{CODE}\s*:|$)")
RULE = re.compile(rf"\s*(?:(?P<only>[^;:=]*)=>)?\s*(?P<code>{CODE})\s*:(?P<text>.*)", re.DOTALL)
PREFERRED = ("zh-hans", "zh-cn", "zh-sg", "zh-my", "zh")
DEPTH = 8  # of markup inside markup


def one_variant(wikitext: str) -> str:
    """The text with one variant of every conversion."""
    for _ in range(DEPTH):
        changed = MARKUP.sub(lambda match: _chosen(match[1]), wikitext)
        if changed == wikitext:
            break
        wikitext = changed
    return wikitext


def _chosen(content: str) -> str:
    flags, bar, rest = content.partition("|")
    named: set[str] = set()
    if not bar:
        rest = content
    elif flags.strip() and FLAGS.fullmatch(flags):
        named = {flag.strip() for flag in flags.split(";")}
    elif flags.strip():  # the bar belongs to a link in the text
        rest = content
    if named & SILENT:
        return ""
    if named - {"A", "+"}:  # raw text, or text for some variants alone
        return rest
    rules = [RULE.fullmatch(part) for part in RULES.split(rest) if part.strip()]
    if not rules or None in rules:
        return rest
    texts = {rule["code"]: rule["text"].strip() for rule in reversed(rules) if rule}
    return next((texts[code] for code in PREFERRED if code in texts), list(texts.values())[-1])
