"""Settings stored next to `tokenizer.json`: BOS, EOS and padding tokens, and the chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luban.core.artifact import read_table, write_json

TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
GENERATION = "generation_config.json"
SETTINGS_FILES = (CONFIG, TEMPLATE, SPECIAL_MAP, GENERATION)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The roles of a vocabulary's tokens."""

    bos_token: str | None = None  # begins a document
    eos_token: str | None = None  # ends a document
    pad_token: str | None = None  # fills a row, never trained on
    unk_token: str | None = None  # stands for what the vocabulary lacks
    stop_ids: tuple[int, ...] = ()  # further ids at which generation stops (generation_config.json)
    chat_template: str | None = None  # Jinja source


def read_settings(folder: Path) -> Settings:
    """Settings in the Hugging Face layout, from whichever of its files are there.

    Raises:
        ArtifactError: a file that is there and is not what its name says.
    """
    config = _json(folder / CONFIG)
    tokens = {**_json(folder / SPECIAL_MAP), **{k: v for k, v in config.items() if v is not None}}
    stop = _json(folder / GENERATION).get("eos_token_id")
    return Settings(
        bos_token=_content(tokens.get("bos_token")),
        eos_token=_content(tokens.get("eos_token")),
        pad_token=_content(tokens.get("pad_token")),
        unk_token=_content(tokens.get("unk_token")),
        stop_ids=tuple(stop) if isinstance(stop, list) else (stop,) if isinstance(stop, int) else (),
        chat_template=_template(folder, config.get("chat_template")),
    )


def _json(path: Path) -> dict[str, Any]:
    return read_table(path) if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A token is written as a string, or as a table with its `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _template(folder: Path, inline: Any) -> str | None:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text(encoding="utf-8")
    if isinstance(inline, list):  # several named templates
        return next((entry["template"] for entry in inline if entry.get("name") == "default"), None)
    return inline


def write_settings(folder: Path, settings: Settings, extra_special: list[str]) -> None:
    """Write settings so that `transformers.AutoTokenizer` reads the directory too."""
    named = {
        "bos_token": settings.bos_token,
        "eos_token": settings.eos_token,
        "pad_token": settings.pad_token,
        "unk_token": settings.unk_token,
    }
    write_json(
        folder / CONFIG,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "additional_special_tokens": extra_special,
            **{name: token for name, token in named.items() if token is not None},
        },
    )
    if settings.chat_template is not None:
        (folder / TEMPLATE).write_text(settings.chat_template, encoding="utf-8")
    if settings.stop_ids:
        write_json(folder / GENERATION, {"eos_token_id": list(settings.stop_ids)})
