"""Values of other formats as plain JSON, whatever a row may hold."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any


def encodable(text: str) -> str:
    r"""The text with lone surrogates (JSON can spell `\ud800`) as U+FFFD, since no UTF-8 file can hold them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def jsonable(value: Any) -> Any:
    """`value` as what `json.dumps` writes as valid JSON.

    NaN and infinities become null, times ISO 8601 strings, bytes their UTF-8 text or else base64, tuples and sets lists,
    keys strings, and all else its `str`.

    Raises:
        RecursionError: the value is nested too deeply.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {encodable(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return encodable(str(value))
