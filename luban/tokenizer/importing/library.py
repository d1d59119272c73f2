"""`tokenizer.json` of the `tokenizers` library, with the settings that stand beside it."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from luban.core.errors import DataError
from luban.tokenizer.settings import Settings, read_settings


def read(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """Raises DataError where the library cannot read the file."""
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")), read_settings(path.parent)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} is not a tokenizer.json: {error}") from None
