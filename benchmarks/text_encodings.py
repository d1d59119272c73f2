"""Share of texts whose encoding is told right from their bytes alone, each text as a file of its own.

    python benchmarks/text_encodings.py --data DIR

DIR holds `tang-poems.jsonl.gz` (poems with `paragraphs`; npm's chinese-poetry) and `wikitext2-valid.txt`.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

from opencc import OpenCC

from luban.corpus.sources.charsets import detect


def share(texts: Iterable[str], codec: str) -> str:
    """How many of the texts that the codec can hold and ASCII cannot are decoded right."""
    right = number = 0
    for text in texts:
        try:
            data = text.encode(codec)
        except UnicodeEncodeError:
            continue
        if not data.isascii():
            number += 1
            right += data.decode(detect(data), "replace") == text
    return f"{right} of {number}"


def main() -> None:
    """Print a line for each encoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    with gzip.open(data / "tang-poems.jsonl.gz", "rt", encoding="utf-8") as file:
        poems = ["\n".join(json.loads(line)["paragraphs"]) for line in file]
    simplified = OpenCC("t2s")
    paragraphs = (data / "wikitext2-valid.txt").read_text(encoding="utf-8").split("\n")
    print("Tang poems, GB18030:", share(map(simplified.convert, poems), "gb18030"))
    print("Tang poems, Big5:", share(poems, "big5hkscs"))
    print("WikiText-2 paragraphs, Windows-1252:", share(paragraphs, "cp1252"))


if __name__ == "__main__":
    main()
