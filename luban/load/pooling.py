"""How a sentence encoder's hidden states become one vector, as sentence-transformers' files beside a model say it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luban.core.artifact import read_table
from luban.core.errors import ArtifactError, UnsupportedError

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
Mode = Literal["mean", "cls", "max", "last"]
FLAGS: dict[str, Mode] = {  # sentence-transformers' fields of 1_Pooling/config.json
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
NAMES: dict[str, Mode] = {"mean": "mean", "cls": "cls", "max": "max", "lasttoken": "last"}  # newer files name the mode


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """From hidden states (B, T, E) to vectors (B, E)."""

    mode: Mode = "mean"  # over the text's tokens; cls: the first one's state, last: the last one's
    normalise: bool = True  # to length 1
    longest: int | None = None  # tokens of a text that are read, special ones included; none: the model's context
    query_prompt: str = ""  # put before a query
    passage_prompt: str = ""  # put before a passage


def read_pooling(folder: Path) -> Pooling:
    """The pooling of the model in `folder`: means of unit length where no file says anything.

    Raises:
        UnsupportedError: a module after the Transformer that isn't pooling or normalisation, or two poolings joined.
        ArtifactError: a damaged file.
    """
    if not (folder / MODULES).is_file():
        return Pooling()
    try:
        modules = [(module["type"].rpartition(".")[2], module["path"]) for module in _read_list(folder / MODULES)]
    except (KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{folder / MODULES} isn't a list of modules with type and path") from None
    mode: Mode = "mean"
    normalise, longest = False, None
    for kind, path in modules:
        if kind == "Transformer":
            file = folder / path / "sentence_bert_config.json"
            longest = read_table(file).get("max_seq_length") if file.is_file() else None
        elif kind == "Pooling":
            mode = _mode(folder / path / "config.json")
        elif kind == "Normalize":
            normalise = True
        else:
            raise UnsupportedError(f"{folder}: its vectors pass through {kind}, which isn't built")
    prompts = read_table(folder / PROMPTS).get("prompts") or {} if (folder / PROMPTS).is_file() else {}
    passage = next((prompts[name] for name in ("document", "passage") if prompts.get(name)), "")
    return Pooling(
        mode=mode,
        normalise=normalise,
        longest=longest,
        query_prompt=prompts.get("query") or "",
        passage_prompt=passage,
    )


def _read_list(file: Path) -> list[Any]:
    try:
        return list(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged: {error}") from None


def _mode(file: Path) -> Mode:
    config = read_table(file)
    if "pooling_mode" in config:
        chosen = [NAMES.get(str(config["pooling_mode"]), str(config["pooling_mode"]))]
    else:
        chosen = [FLAGS.get(flag, flag) for flag, on in config.items() if flag.startswith("pooling_mode_") and on]
    if len(chosen) != 1 or chosen[0] not in NAMES.values():
        raise UnsupportedError(f"{file}: pooling by {' and '.join(map(str, chosen)) or 'nothing'} isn't built")
    return chosen[0]  # type: ignore[return-value]
