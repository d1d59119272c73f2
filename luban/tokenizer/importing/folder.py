"""A Hugging Face directory without `tokenizer.json`: its older vocabulary file with the settings that stand beside it.

Such a file does not say what the model's code puts around a text, which tokens it appends to the vocabulary or whether it
shifts the ids. `FAMILIES` has the model types of which that is known; of others the vocabulary is not read.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import tokenizers
from tokenizers import AddedToken, processors

from luban.core.artifact import read_table
from luban.core.errors import ArtifactError
from luban.tokenizer.importing import FORMATS
from luban.tokenizer.importing.artifact import VOCABULARIES, format_of
from luban.tokenizer.settings import CONFIG, Settings, read_settings
from luban.tokenizer.tokenizer import Tokenizer

MODEL_CONFIG, ADDED = "config.json", "added_tokens.json"


class Family(NamedTuple):
    """What transformers' tokenizer of a model type does that the vocabulary file does not say."""

    formats: tuple[str, ...]  # entries of FORMATS for which this holds
    bos: bool = False  # texts begin with the begin token
    eos: bool = False  # texts end with the end token
    extra_ids: int = 0  # sentinels <extra_id_…> appended to the vocabulary, the last number first


LLAMA = Family(("sentencepiece", "tiktoken", "tekken"), bos=True)
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "gemma", "gemma2"), LLAMA),
    "t5": Family(("sentencepiece",), eos=True, extra_ids=100),
    **dict.fromkeys(("mt5", "umt5"), Family(("sentencepiece",), eos=True)),
    "gpt2": Family(("gpt2",)),
}
BARE = Family(tuple(FORMATS.entries))  # of a directory that holds no model


def vocabulary_file(folder: Path) -> Path | None:
    """The older vocabulary file in a directory, or None where there is none or its model type is not known here."""
    file = next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)
    family = _family(folder)
    return file if file is not None and family is not None and format_of(file) in family.formats else None


def unknown_use(folder: Path) -> str:
    """The end of an error message about a directory whose older vocabulary file `vocabulary_file` does not take."""
    file = next((name for name in VOCABULARIES if (folder / name).is_file()), None)
    if file is None:
        return ""
    return (
        f"; its {file} alone does not say how a model of type {_table(folder / MODEL_CONFIG).get('model_type')!r} uses it: "
        "transformers' AutoTokenizer makes a tokenizer.json of it (from_pretrained, then save_pretrained)"
    )


def read_vocabulary(file: Path) -> Tokenizer:
    """The tokenizer of a vocabulary file and of the settings beside it, as transformers makes it of them.

    Raises:
        ArtifactError: tokens appended to the vocabulary whose ids do not follow on its own.
        DataError: the file is damaged or of no known format.
    """
    folder = file.parent
    model, settings = FORMATS[format_of(file)](file)
    beside = read_settings(folder)
    given = {f.name: value for f in fields(Settings) if (value := getattr(beside, f.name))}
    settings = replace(settings, **given)
    config = _table(folder / CONFIG)
    family = _family(folder) or BARE
    _append(model, file, int(config.get("extra_ids", family.extra_ids)))
    roles = (settings.bos_token, settings.eos_token, settings.pad_token, settings.unk_token)
    known = [token for token in roles if token and model.token_to_id(token) is not None]
    model.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])
    bos = settings.bos_token if config.get("add_bos_token", family.bos) else None
    eos = settings.eos_token if config.get("add_eos_token", family.eos) else None
    _put_ends(model, [bos] if bos and bos in known else [], [eos] if eos and eos in known else [])
    return Tokenizer(model, settings)


def _family(folder: Path) -> Family | None:
    if not (folder / MODEL_CONFIG).is_file():
        return BARE
    return FAMILIES.get(str(_table(folder / MODEL_CONFIG).get("model_type")))


def _append(model: tokenizers.Tokenizer, file: Path, extra_ids: int) -> None:
    """Add the tokens that stand in other files than the vocabulary, at the ids that they have there."""
    size = model.get_vocab_size()
    named = {i: str(token) for token, i in _table(file.parent / ADDED).items()}
    decoder = _table(file.parent / CONFIG).get("added_tokens_decoder") or {}
    named |= {int(i): entry["content"] for i, entry in decoder.items()}
    special = {entry["content"] for entry in decoder.values() if entry.get("special")}
    for number in reversed(range(extra_ids)):
        token = f"<extra_id_{number}>"
        named.setdefault(size + extra_ids - 1 - number, token)
        special.add(token)
    for i, token in sorted(named.items()):
        add = model.add_special_tokens if token in special or not decoder else model.add_tokens
        add([AddedToken(token, normalized=False)])
        if model.token_to_id(token) != i:
            raise ArtifactError(
                f"{file.parent}: the token {token!r} has the id {i} there, and {model.token_to_id(token)} behind "
                f"{file.name}: save the tokenizer with transformers' AutoTokenizer, which writes a tokenizer.json"
            )


def _put_ends(model: tokenizers.Tokenizer, head: list[str], tail: list[str]) -> None:
    """Let the vocabulary itself say what stands before and behind a text."""
    if head or tail:
        single = " ".join([*head, "$A", *tail])
        marks = [(token, model.token_to_id(token)) for token in dict.fromkeys([*head, *tail])]
        model.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} {single.replace('$A', '$B')}", special_tokens=marks
        )


def _table(file: Path) -> dict:
    return read_table(file) if file.is_file() else {}
