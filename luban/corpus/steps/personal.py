"""Personal data that has a form: e-mail addresses and public IPv4 addresses are replaced, never guessed at.

The replacements are reserved for examples (RFC 2606, RFC 5737), so that the text still reads as text. Four small numbers
are more often a section or a version than an address: they count as one only behind a word that says so.

A part of an address is in one script (as registries require of domains), so that a letter of another script ends it as
a space does: `请联系ab@example.com咨询`, `ИмейлIvan@example.comработает`. Of scripts other than Latin, Greek and Cyrillic,
which may be written without spaces, an address ends with a top-level domain that exists, as in `a@例子.中国咨询`.
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

ACCENTS = "\u0300-\u036f"  # combining, of any script
LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
GREEK, CYRILLIC = "\u0370-\u03ff\u1f00-\u1fff", "\u0400-\u052f"
OTHER = (  # Armenian, Hebrew, Arabic, Indic scripts, Thai, Lao, Georgian, Korean, Japanese and Chinese
    "\u0531-\u0556\u0561-\u0587\u05d0-\u05ea\u0620-\u065f\u066e-\u06d3\u0900-\u0963\u0966-\u0e3a\u0e40-\u0e4e\u0e81-\u0eff"
    "\u10a0-\u10ff\u200c\u200d\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
)
LETTER = f"{LATIN}{GREEK}{CYRILLIC}{ACCENTS}"
WORD = f"{LETTER}0-9_"  # what an IPv4 address cannot touch on either side
_TOP = (  # internationalised top-level domains in OTHER scripts (IANA's root zone)
    "中国 中國 香港 台湾 台灣 澳門 澳门 新加坡 公司 网络 網路 网址 在线 中文网 集团 机构 组织机构 政务 公益 商城 商店 商标 网店 网站"
    " 我爱你 移动 手机 世界 信息 健康 娱乐 游戏 餐厅 招聘 购物 慈善 企业 时尚 广东 佛山 八卦 天主教 新闻 食品 书籍 微博 大拿 点看"
    " みんな コム クラウド ストア セール ファッション ポイント 한국 닷컴 닷넷 ไทย คอม ລາວ հայ გე ישראל קום"
    " भारत भारतम् भारोत संगठन नेट कॉम বাংলা ভারত ਭਾਰਤ ભારત ଭାରତ இந்தியா இலங்கை சிங்கப்பூர் భారత్ ಭಾರತ ഭാരതം ලංකා"
    " السعودية امارات الاردن الجزائر المغرب ایران بھارت بارت پاکستان تونس سودان سورية عراق عمان فلسطين قطر مصر موريتانيا"
    " مليسيا موقع شبكة كوم بازار همراه عرب"
)


def _label(script: str) -> str:
    return rf"[{script}](?:[{script}{ACCENTS}0-9-]{{0,61}}[{script}{ACCENTS}0-9])?\."


def _local(script: str, first: str) -> str:
    """A user's name in one script, which may begin in the middle of letters of another one."""
    return rf"(?<![{script}{ACCENTS}0-9_])[{script}{first}][{script}{ACCENTS}0-9_.+%-]{{0,63}}"


def _top(script: str) -> str:
    return rf"[{script}][{script}{ACCENTS}]{{1,23}}(?![{script}{ACCENTS}0-9_]|\()"  # no call, as in x@y.sum()


_LABELS = "|".join([_label(LATIN + "0-9"), *map(_label, (GREEK, CYRILLIC, OTHER))])
_LISTED = "|".join(map(re.escape, sorted(_TOP.split(), key=len, reverse=True)))
_LOCALS = "|".join([_local(LATIN, "0-9_"), _local(GREEK, ""), _local(CYRILLIC, "")])
_TOPS = rf"xn--[a-z0-9-]{{2,59}}(?![{LATIN}0-9_])|{'|'.join(map(_top, (LATIN, GREEK, CYRILLIC)))}"
EMAIL = re.compile(
    rf"(?:(?P<local>{_LOCALS})[@＠](?:{_LABELS})+(?:(?P<top>{_TOPS})|{_LISTED})"
    rf"|{_local(OTHER, '')}[@＠](?:{_LABELS})+(?:{_LISTED}))"
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
    if (found["top"] or "").lower() in FILE_ENDINGS or (found["local"] or "").lower() == "git":
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
