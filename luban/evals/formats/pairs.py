"""Texts beside each other: translations, and meanings with their wordings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.evals.formats.files import text_lines


def wmt(path: Path) -> Iterator[dict[str, Any]]:
    """WMT's pairs: SOURCE+REFERENCE, two files of as many lines joined by a plus sign, or one of tab-separated pairs: `source`,
    `reference`."""
    first, plus, second = str(path).partition("+")
    if plus:
        other = Path(second) if Path(second).is_absolute() else Path(first).parent / second
        sources, references = (_whole(p) for p in (Path(first), other))
        if len(sources) != len(references):
            raise DataError(f"{first} has {len(sources)} lines and {second} {len(references)}: they must be parallel")
        pairs = list(zip(sources, references, strict=True))
    else:
        pairs = []
        for number, line in enumerate(_whole(path), 1):
            parts = line.split("\t")
            if len(parts) < 2:
                raise DataError(f"{path}:{number} has no tab between source and reference")
            pairs.append((parts[0], parts[1]))
    for source, reference in pairs:
        yield {"source": source, "reference": reference}


def _whole(path: Path) -> list[str]:
    lines = text_lines(path)
    return lines[:-1] if lines and not lines[-1] else lines


def e2e(path: Path) -> Iterator[dict[str, Any]]:
    """The E2E challenge (Novikova et al. 2017) as `meaning || wording` lines: `meaning`, `wordings` of one meaning together."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(_whole(path), 1):
        meaning, bars, wording = line.partition("||")
        if not bars:
            raise DataError(f"{path}:{number} has no || between meaning and wording")
        found.setdefault(meaning.strip(), []).append(wording.strip())
    for meaning, wordings in found.items():
        yield {"meaning": meaning, "wordings": wordings}
