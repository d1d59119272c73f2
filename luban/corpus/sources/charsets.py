"""The encoding of text: by its byte order mark, by its label as the WHATWG encoding standard reads labels, or detected.

Labels are resiliparse's, detection is chardetng's, which is Firefox's. Where Python's codec knows less than browsers decode
under the same label, the larger codec of the same family is taken (Windows-1252 for ISO 8859-1, GB18030 for GBK, …).
"""

from __future__ import annotations

import codecs
import io
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from luban.core.errors import MissingExtra
from luban.corpus.sources.compression import DAMAGED, open_bytes
from luban.corpus.tally import Tally

REPLACED = "\ufffd"  # what stands for bytes that could not be decoded
MOST_REPLACED = 0.01  # share of a text's characters that may be REPLACED; a single one is always allowed
BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
LARGER = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
LABEL_BYTES = 1024  # in which a page's own label must stand (WHATWG HTML standard, section 13.2.3.2)
OWN_LABEL = re.compile(
    rb"""<meta\s[^>]*charset\s*=\s*["']?\s*([^\s"'/>;]+)|<\?xml\s[^>]*encoding\s*=\s*["']([^"']+)""", re.IGNORECASE
)
ESCAPE = b"\x1b$"
ISO_2022_JP = re.compile(rb"\x1b\$[@B]")  # 7 bits a byte, so that it is valid UTF-8
POUNDS = re.compile(rb"\xa3 ?[0-9]")  # an amount of money; in Central European encodings the byte is a letter
SAMPLE = 256 << 10  # bytes of lines outside ASCII from which a file's encoding is detected
SEARCHED = 256 << 20  # bytes of a file in which these lines are looked for


def damaged(text: str) -> bool:
    """True if the share of replacement characters in the text exceeds MOST_REPLACED."""
    return REPLACED in text and text.count(REPLACED) > max(1, MOST_REPLACED * len(text))


def byte_order_mark(data: bytes) -> tuple[bytes, str] | None:
    """The byte order mark that the data begin with, and its codec."""
    return next((pair for pair in BOMS if data.startswith(pair[0])), None)


def codec_of(label: str | None) -> str | None:
    """The Python codec for a label of the WHATWG encoding standard, or None where it is no such label.

    What servers add to labels is ignored: quotes, white space, and all from a comma or semicolon on.
    """
    name = re.split(r"[,;]", label or "", maxsplit=1)[0].strip(" \t\r\n\f\"'")
    found = _resiliparse().map_encoding_to_html5(name, fallback_utf8=False) if name else None
    return _larger(found) if found else None


def page_text(data: bytes, label: str | None = None) -> str:
    """A page's text from its bytes and the label that came with them (of HTTP's Content-Type), which may be wrong.

    The order is the standard's: byte order mark, the label given, the page's own label, detection. Departures: UTF-16 is
    not believed where no byte is zero, and a label under which the text is `damaged` loses against detection if
    that decodes more.
    """
    mark = byte_order_mark(data)
    if mark is not None:
        return data[len(mark[0]) :].decode(mark[1], "replace")
    declared = codec_of(label)
    if declared is not None and declared.startswith("utf-16") and b"\0" not in data[:LABEL_BYTES]:
        declared = None
    if declared is None:
        declared = codec_of(_own_label(data))
        if declared is not None and declared.startswith("utf-16"):
            declared = "utf-8"  # the label was read as ASCII, so it is wrong
    text = None if declared is None else data.decode(declared, "replace")
    if text is None or damaged(text):
        other = data.decode(detect(data), "replace")
        if text is None or other.count(REPLACED) < text.count(REPLACED):
            return other
    return text


def _own_label(data: bytes) -> str | None:
    found = OWN_LABEL.search(data[:LABEL_BYTES])
    return (found[1] or found[2]).decode("ascii", "replace") if found else None


def detect(data: bytes) -> str:
    """The codec that the bytes are most likely in; UTF-8 where more characters of it are valid than not."""
    if ISO_2022_JP.search(data) and data.isascii():
        return "iso2022_jp"
    text = data.decode("utf-8", "replace")
    invalid = text.count(REPLACED) - data.count(REPLACED.encode())
    outside_ascii = len(text) - len(text.encode("ascii", "ignore")) - text.count(REPLACED)
    if not invalid or outside_ascii > invalid:
        return "utf-8"
    detector = _chardetng()()
    detector.feed(data[:SAMPLE], last=len(data) < SAMPLE)  # else the last character may be incomplete
    codec = _larger(detector.guess(tld=None, allow_utf8=False))
    return "cp1252" if codec in ("cp1250", "iso8859-2") and POUNDS.search(data) else codec


def _larger(name: str) -> str:
    try:
        name = codecs.lookup(name).name
    except LookupError:  # a name that only the detector knows
        return "utf-8"
    return LARGER.get(name, name)


@lru_cache(maxsize=1)
def _resiliparse() -> Any:
    try:
        from resiliparse.parse import encoding
    except ImportError:
        raise MissingExtra("resiliparse", "corpus", "reading HTML") from None
    return encoding


@lru_cache(maxsize=1)
def _chardetng() -> Any:
    try:
        from chardetng_py import EncodingDetector
    except ImportError:
        raise MissingExtra("chardetng-py", "corpus", "reading text that is not in UTF-8") from None
    return EncodingDetector


def open_text(path: Path) -> BinaryIO:
    """The bytes of a text file, unpacked; of UTF-16 and UTF-32 files with a byte order mark, their UTF-8."""
    file = open_bytes(path)
    try:
        mark = byte_order_mark(file.peek(4)[:4])  # type: ignore[attr-defined]
    except DAMAGED:  # reading it finds the damage, and counts it
        return file
    return file if mark is None or mark[1] == "utf-8" else io.BufferedReader(_Recoded(file, mark[1]))


class _Recoded(io.RawIOBase):
    """A stream of text as UTF-8, its byte order mark included."""

    def __init__(self, file: BinaryIO, codec: str):
        self.text = io.TextIOWrapper(file, codec, errors="replace", newline="")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[override]
        data = self.text.read(max(len(buffer) // 4, 1)).encode()  # a character takes up to four bytes
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.text.close()
        super().close()


class FileDecoder:
    """Decodes the bytes of one file as UTF-8, and from the first invalid byte on in the encoding it is found to be in."""

    def __init__(self, path: Path, tally: Tally):
        self.path, self.tally = path, tally
        self.tail = b""  # the beginning of a UTF-8 character whose end has not come yet
        self.codec: str | None = None  # known once a byte is not UTF-8
        self.decoder: codecs.IncrementalDecoder | None = None  # of this codec

    def decode(self, data: bytes, final: bool = True) -> str:
        """The text of the file's next bytes, line ends as `\\n`.

        Text converted from another encoding and characters replaced are counted. Unless the bytes are `final`, an
        incomplete character at their end is kept for the next call.
        """
        data, self.tail = self.tail + data, b""
        text = self._utf8(data, final) if self.decoder is None else None
        if text is None:
            text = self._converted(data, final)
        return text.removeprefix("\ufeff").replace("\r\n", "\n")

    def _utf8(self, data: bytes, final: bool) -> str | None:
        """The text, or None where it is not UTF-8."""
        if ESCAPE in data and ISO_2022_JP.search(data):
            return None
        try:
            text, used = codecs.utf_8_decode(data, "strict", final)
        except UnicodeDecodeError:
            return None
        self.tail = data[used:]
        return text

    def _converted(self, data: bytes, final: bool) -> str:
        if self.decoder is None:
            self.codec = detect(data if data.isascii() else _sample(self.path) or data)
            self.decoder = codecs.getincrementaldecoder(self.codec)("replace")
        text = self.decoder.decode(data, final)
        if final:
            self.decoder.reset()
        if self.codec == "utf-8":
            self.tally.add("invalid_utf8_replaced", text.count(REPLACED) - data.count(REPLACED.encode()))
        elif not text.isascii():
            self.tally.add(f"texts_converted_from_{self.codec}")
        return text


def _sample(path: Path) -> bytes:
    """The first lines outside ASCII of a file."""
    held, size, read = [], 0, 0
    try:
        with open_bytes(path) as file:
            while size < SAMPLE and read < SEARCHED and (line := file.readline(SAMPLE)):
                read += len(line)
                if not line.isascii():
                    held.append(line)
                    size += len(line)
    except DAMAGED:
        pass  # what comes before the damage is enough; reading the file counts it
    return b"".join(held)
