"""Personal data that has a form: e-mail addresses and public IPv4 addresses are replaced, never guessed at.

The replacements are reserved for examples (RFC 2606, RFC 5737), so that the text still reads as text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

from luban.corpus.document import Document, conversation_text
from luban.corpus.tally import Tally

EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z]{2,24}\b")
ADDRESS = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)")
EXAMPLE_EMAIL, EXAMPLE_ADDRESS = "someone@example.com", "192.0.2.1"


def personal(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Replace addresses in every text and message, counting them."""
    for document in documents:
        messages = document.messages
        if messages is not None:
            messages = [{**message, "content": scrub(message["content"], tally)} for message in messages]
            text = conversation_text(messages)
        else:
            text = scrub(document.text, tally)
        yield replace(document, text=text, messages=messages)


def scrub(text: str, tally: Tally) -> str:
    """`text` without e-mail addresses and public IPv4 addresses."""
    text, emails = EMAIL.subn(EXAMPLE_EMAIL, text) if "@" in text else (text, 0)
    tally.add("emails_replaced", emails)

    def example(found: re.Match[str]) -> str:
        if not _is_public(found[0]):
            return found[0]
        tally.add("ip_addresses_replaced")
        return EXAMPLE_ADDRESS

    return ADDRESS.sub(example, text)


def _is_public(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_global
    except ValueError:
        return False
