"""Personal data that has a form: e-mail addresses and public IPv4 addresses are replaced, never guessed at.

The replacements are reserved for examples (RFC 2606, RFC 5737), so that the text still reads as text. Four small numbers
are more often a section or a version than an address: they count as one only behind a word that says so.

Addresses are written in letters of alphabets with spaces between words (Latin, Greek, Cyrillic). All other letters, such
as Chinese, Japanese, Korean, Thai, Arabic and Devanagari ones, end an address as a space does, because those scripts
write `请联系ab@example.com咨询` without spaces. Addresses in those scripts themselves are not recognised.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from luban.corpus.conversation import map_strings
from luban.corpus.document import Document, conversation_text
from luban.corpus.tally import Tally

# letters of Latin, Greek and Cyrillic, with combining accents
LETTER = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0300-\u03ff\u0400-\u052f\u1e00-\u1fff"
WORD = f"{LETTER}0-9_"  # what an address cannot touch on either side
EMAIL = re.compile(
    rf"(?<![{WORD}])(?P<local>[{WORD}][{WORD}.+%-]{{0,63}})[@＠]"
    rf"(?P<domain>(?:[{LETTER}0-9](?:[{LETTER}0-9-]{{0,61}}[{LETTER}0-9])?\.)+(?P<top>xn--[a-z0-9-]{{2,59}}|[{LETTER}]{{2,24}}))"
    rf"(?![{WORD}]|\()"  # no call, as in x@y.sum()
)
REMOTE_PATH = re.compile(r":[\w.~/-]*(?:/|\.git\b)", re.ASCII)  # behind user@host: a path of scp, rsync or git
_ENDINGS = (
    "7z apk avif bmp bz2 cjs css csv dll dmg docx eot exe gif gz heic htm html ico iso jar jpeg jpg js json jsx log mjs"
    " mp3 mp4 otf pdf png pptx rpm svg tar tgz tif tiff toml ts tsv tsx ttf txt wasm wav webm webp whl woff woff2 xlsx"
    " xml xz yaml yml"
)
FILE_ENDINGS = frozenset(_ENDINGS.split())  # of icon@2x.png and package@1.2.3.tgz; no top-level domain is among them
ADDRESS = re.compile(rf"(?<![{WORD}.])(?:[0-9]{{1,3}}\.){{3}}[0-9]{{1,3}}(?![{WORD}.]*[0-9]|[{WORD}]|\.in-addr)")
SMALL = 64  # a random address has a number from this on with probability 0.996
SAYS_SO = re.compile(
    rf"(?:(?<![{WORD}])(?:ip|ipv4|inet|addr|address|host|hostname|dns|server|client|peer|proxy|gateway|subnet|route|ping|login"
    rf"|connect|from|to|at|via)(?![{WORD}])|//|[@＠]|地址|位址|服务器|伺服器|主机|主機|网关|網關|代理|访问|訪問|连接|連接|登录|登入"
    r"|アドレス|サーバー?|ホスト|주소|서버|호스트)(?:\W|[为為是即はがをにへ은는이가을를]){0,3}$",
    re.IGNORECASE,
)
BEFORE = 16  # characters in which that word stands
EXAMPLE_EMAIL, EXAMPLE_ADDRESS = "someone@example.com", "192.0.2.1"


def personal(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Replace addresses in every text and message, tool calls included, and count them."""
    for document in documents:
        if document.messages is None:
            yield replace(document, text=scrub(document.text, tally))
            continue
        messages: list[dict[str, Any]] = [
            map_strings(message, lambda t: scrub(t, tally)) for message in document.messages
        ]
        yield replace(document, text=conversation_text(messages), messages=messages)


def scrub(text: str, tally: Tally) -> str:
    """`text` without e-mail addresses and public IPv4 addresses."""
    if "@" in text or "＠" in text:
        text = _replaced(EMAIL, text, _is_email, EXAMPLE_EMAIL, "emails_replaced", tally)
    return _replaced(ADDRESS, text, _is_address, EXAMPLE_ADDRESS, "ip_addresses_replaced", tally)


def _replaced(
    pattern: re.Pattern[str], text: str, is_one: Callable[[re.Match[str]], bool], by: str, counted: str, tally: Tally
) -> str:
    def example(found: re.Match[str]) -> str:
        if not is_one(found):
            return found[0]
        tally.add(counted)
        return by

    return pattern.sub(example, text)


def _is_email(found: re.Match[str]) -> bool:
    """True if a match isn't a file name, a remote folder, or the user `git` of a code host."""
    if found["top"].lower() in FILE_ENDINGS or found["local"].lower() == "git":
        return False
    return not REMOTE_PATH.match(found.string, found.end())


def _is_address(found: re.Match[str]) -> bool:
    """True if a match is a public address and unlikely to be a section or version number."""
    small = all(int(number) < SMALL for number in found[0].split("."))
    before = found.string[max(found.start() - BEFORE, 0) : found.start()]
    return _is_public(found[0]) and (not small or bool(SAYS_SO.search(before)))


def _is_public(address: str) -> bool:
    try:
        known = ipaddress.IPv4Address(address)
        return known.is_global and not known.is_multicast
    except ValueError:
        return False
