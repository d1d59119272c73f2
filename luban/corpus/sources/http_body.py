"""HTTP message bodies: transfer and content codings undone (RFC 9112, section 7; RFC 9110, section 8.4)."""

from __future__ import annotations

import http.client
import io
import re
import zlib
from collections.abc import Callable

from luban.corpus.arrow import require_pyarrow

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how such data begin
MARKUP = re.compile(rb"(?:\xef\xbb\xbf)?\s*<")  # how a page begins
CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]+[ \t]*(?:;[^\r\n]*)?\r?\n")


def decode_body(body: bytes, transfer: str, content: str, most: int) -> bytes:
    """The body without its codings, up to `most` bytes.

    Crawlers often store a decoded body below the headers of the encoded one, so a body that a coding does not fit stands
    as it is where it begins like markup. A compressed body is also detected by its first bytes.

    Args:
        transfer, content: values of the headers Transfer-Encoding and Content-Encoding, empty where they are missing.

    Raises:
        ValueError: an unknown coding, or a body that is damaged.
    """
    for name in [*reversed(_names(transfer)), *reversed(_names(content))]:
        try:
            body = _decode(body, name, most)
        except ValueError:
            if not MARKUP.match(body):
                raise
    undeclared = next((name for magic, name in ((GZIP, "gzip"), (ZSTD, "zstd")) if body.startswith(magic)), None)
    return _decode(body, undeclared, most) if undeclared else body


def _names(header: str) -> list[str]:
    names = (name.strip().lower().removeprefix("x-") for name in header.split(","))
    return [name for name in names if name not in ("", "identity")]


def _decode(body: bytes, name: str, most: int) -> bytes:
    if name not in CODINGS:
        raise ValueError(f"unknown coding '{name}'")
    try:
        return CODINGS[name](body, most)
    except (ValueError, OSError, zlib.error, http.client.HTTPException) as error:
        raise ValueError(f"damaged {name} body: {error!r:.80}") from None


def _chunked(body: bytes, most: int) -> bytes:
    if not CHUNK_SIZE.match(body):
        raise ValueError("no chunk size at its beginning")

    class Connection:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)

    response = http.client.HTTPResponse(Connection())  # type: ignore[arg-type]
    response.begin()
    return response.read(most)


def _gzip(body: bytes, most: int) -> bytes:
    """Every member; what follows the last one is ignored, as browsers do."""
    found = b""
    while body.startswith(GZIP) or not found:
        member = zlib.decompressobj(wbits=31)
        found += member.decompress(body, most - len(found))
        if len(found) >= most:
            break
        if not member.eof:
            raise ValueError("the body ends too early")
        body = member.unused_data
    return found


def _deflate(body: bytes, most: int) -> bytes:
    """zlib's format, as the standard says, or bare deflate, as some servers send."""
    try:
        return _inflate(body, most, zlib.MAX_WBITS)
    except zlib.error:
        return _inflate(body, most, -zlib.MAX_WBITS)


def _inflate(body: bytes, most: int, wbits: int) -> bytes:
    stream = zlib.decompressobj(wbits=wbits)
    found = stream.decompress(body, most)
    if not stream.eof and len(found) < most:
        raise ValueError("the body ends too early")
    return found


def _arrow(codec: str) -> Callable[[bytes, int], bytes]:
    def decode(body: bytes, most: int) -> bytes:
        pyarrow, _ = require_pyarrow("reading compressed pages")
        return pyarrow.CompressedInputStream(pyarrow.BufferReader(body), codec).read(most)

    return decode


CODINGS: dict[str, Callable[[bytes, int], bytes]] = {
    "chunked": _chunked,
    "gzip": _gzip,
    "deflate": _deflate,
    "br": _arrow("brotli"),
    "zstd": _arrow("zstd"),
}
