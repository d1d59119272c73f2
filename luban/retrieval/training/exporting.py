"""Encoders written in the Hugging Face layout, with the files that say how their vectors are pooled."""

from __future__ import annotations

import shutil
from pathlib import Path

from luban.load.export import export_model
from luban.load.model import LoadedModel

POOLING_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling",
    "README.md",
)


def write_encoder(encoder: LoadedModel, folder: Path) -> None:
    """Write a sentence encoder, with the pooling files that lie beside the one that it was made from."""
    export_into(encoder, folder)
    for name in POOLING_FILES:
        source = encoder.path / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copy2(source, folder / name)


def export_into(model: LoadedModel, folder: Path) -> None:
    """As `export_model`, into a folder that may exist."""
    folder.mkdir(exist_ok=True)
    exported = export_model(model, folder / "exported")
    for file in exported.iterdir():
        file.rename(folder / file.name)
    exported.rmdir()
