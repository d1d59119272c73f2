"""Personal data that has a form: e-mail addresses and public IPv4 addresses are replaced, never guessed at.

The replacements are reserved for examples (RFC 2606, RFC 5737), so that the text still reads as text. Four small numbers
are more often a section or a version than an address: they count as one only behind a word that says so.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from luban.corpus.document import Document, conversation_text, rewrite_messages
from luban.corpus.tally import Tally

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z]{2,24}\b(?!\()")  # no call, as in x@y.sum()
ADDRESS = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d|\.in-addr)")
SMALL = 64  # a random address has a number from this on with probability 0.996
SAYS_SO = re.compile(
    r"(?:\b(?:ip|ipv4|inet|addr|address|host|hostname|dns|server|client|peer|proxy|gateway|subnet|route|ping|login|connect"
    r"|from|to|at|via)\b|//|@|地址)\W{0,3}$", re.IGNORECASE)  # fmt: skip
BEFORE = 16  # characters in which that word stands
EXAMPLE_EMAIL, EXAMPLE_ADDRESS = "someone@example.com", "192.0.2.1"


def personal(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Replace addresses in every text and message, counting them."""
    for document in documents:
        messages = document.messages
        if messages is not None:
            messages = rewrite_messages(messages, lambda text: scrub(text, tally))
            text = conversation_text(messages)
        else:
            text = scrub(document.text, tally)
        yield replace(document, text=text, messages=messages)


def scrub(text: str, tally: Tally) -> str:
    """`text` without e-mail addresses and public IPv4 addresses."""
    text, emails = EMAIL.subn(EXAMPLE_EMAIL, text) if "@" in text else (text, 0)
    tally.add("emails_replaced", emails)

    def example(found: re.Match[str]) -> str:
        small = all(int(number) < SMALL for number in found[0].split("."))
        before = text[max(found.start() - BEFORE, 0) : found.start()]
        if not _is_public(found[0]) or (small and not SAYS_SO.search(before)):
            return found[0]
        tally.add("ip_addresses_replaced")
        return EXAMPLE_ADDRESS

    return ADDRESS.sub(example, text)


def _is_public(address: str) -> bool:
    try:
        known = ipaddress.IPv4Address(address)
        return known.is_global and not known.is_multicast
    except ValueError:
        return False
