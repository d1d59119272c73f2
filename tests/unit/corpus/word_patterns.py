"""What words and tokens are, as regular expressions: the reference for the array operations of luban.corpus.words."""

from __future__ import annotations

import re
import sys
import unicodedata

SIGNS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
MARKS = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c).startswith("M"))
WORD = re.compile(rf"(?![{MARKS}])(?:[{SIGNS}][{MARKS}]*|[^\W{SIGNS}](?:[^\W{SIGNS}]|[{MARKS}])*)")
TOKEN = re.compile(r"\S+")
