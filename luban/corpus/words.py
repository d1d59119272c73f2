"""Words, for filters and fingerprints: runs of letters and digits; each Chinese, Japanese or Korean sign is one."""

from __future__ import annotations

import re

WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+"
)


def words(text: str) -> list[str]:
    """The words of `text` in order, in lower case."""
    return WORD.findall(text.lower())
