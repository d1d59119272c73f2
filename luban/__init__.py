"""Luban: one code base for a language model's whole life. Public names load their package on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "ModelSpec": "luban.models.spec",
    "build_model": "luban.models.build",
    "describe": "luban.models.describe",
    "load_model": "luban.load.model",
    "export_model": "luban.load.export",
    "load_tokenizer": "luban.load.tokenizer",
    "Engine": "luban.serve.engine",
    "Sampling": "luban.generate.sampling",
    "Structure": "luban.generate.structure",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'luban' has no attribute '{name}'")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
