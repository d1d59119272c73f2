"""Mistral's `tekken.json`: byte-level BPE by rank behind a block of special tokens (format: mistral-common)."""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any

import tokenizers

from luban.core.errors import DataError, problem
from luban.tokenizer.importing.tiktoken import byte_bpe
from luban.tokenizer.settings import Settings

# The special tokens of files that don't list theirs (up to version v7), in id order; the others are <SPECIAL_20>, …
LISTED = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
)


def read(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """The vocabulary: special tokens first, then as many ranks as fit into the stated size.

    Raises:
        DataError: the file is no tekken vocabulary.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        config = data["config"]
        count, size, pattern = config["default_num_special_tokens"], config["default_vocab_size"], config["pattern"]
        special = _special(data.get("special_tokens"), count)
        entries = sorted(data["vocab"], key=lambda entry: entry["rank"])[: size - count]
        ranks = {base64.b64decode(entry["token_bytes"], validate=True): int(entry["rank"]) for entry in entries}
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise DataError(f"{path} is not a tekken vocabulary: {problem(error)}") from None
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing or list(ranks.values()) != list(range(len(ranks))):
        raise DataError(
            f"{path} is not a tekken vocabulary: {missing or 'no'} bytes without a rank, and ranks must be 0, 1, 2, …"
        )
    bos, eos, pad, unknown = (token if token in special else None for token in ("<s>", "</s>", "<pad>", "<unk>"))
    settings = Settings(bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unknown)
    return byte_bpe(ranks, pattern, special, first=count), settings


def _special(listed: list[dict[str, Any]] | None, count: int) -> dict[str, int]:
    """Special token → id, for ids 0 to `count - 1`."""
    names = (
        list(LISTED) if listed is None else [entry["token_str"] for entry in sorted(listed, key=lambda e: e["rank"])]
    )
    names += [f"<SPECIAL_{i}>" for i in range(len(names), count)]
    found = {name: i for i, name in enumerate(names)}
    if len(found) != count:
        raise ValueError(f"{len(found)} different special tokens, {count} stated")
    return found
