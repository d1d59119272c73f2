"""A tokenizer by the names that models have."""

from __future__ import annotations

from pathlib import Path

from luban.load.packaged import PACKAGED, packaged_file
from luban.tokenizer import tokenizer
from luban.tokenizer.tokenizer import Tokenizer


def vocabulary_path(path_or_name: str | Path) -> Path:
    """Where the tokenizer is: the path itself, or of a model that a package carries (smollm2) its file.

    Raises ArtifactError where the package is missing.
    """
    path, name = Path(path_or_name), str(path_or_name)
    return packaged_file(name) if name in PACKAGED and not path.exists() else path


def load_tokenizer(path_or_name: str | Path) -> Tokenizer:
    """`luban.tokenizer.tokenizer.load_tokenizer`, by path or by the name of a model that a package carries (smollm2).

    Raises:
        ArtifactError: there is none of this name or at this path, or its files are damaged.
    """
    return tokenizer.load_tokenizer(vocabulary_path(path_or_name))
