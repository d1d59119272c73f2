"""Passages whose last word is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.evals.formats.files import json_lines


def lambada(path: Path) -> Iterator[dict[str, Any]]:
    """LAMBADA (Paperno et al. 2016) as OpenAI published it, a JSON object with `text` a line: `context` and the last `word`."""
    for number, row in json_lines(path, ("text",)):
        context, space, word = row["text"].strip().rpartition(" ")
        if not space:
            raise DataError(f"{path}:{number} is a single word, with no passage before it")
        yield {"context": context, "word": word}
