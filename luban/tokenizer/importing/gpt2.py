"""GPT-2's two files: `vocab.json` and, beside it, `merges.txt` or `vocab.bpe` (Radford et al. 2019)."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from luban.core.errors import DataError
from luban.tokenizer.settings import Settings

MERGES = ("merges.txt", "vocab.bpe")
END = "<|endoftext|>"


def read(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """Raises DataError where a file is missing or not what its name says."""
    beside = next((path.with_name(name) for name in MERGES if path.with_name(name).is_file()), None)
    if beside is None:
        raise DataError(f"{path} needs its merges beside it: {' or '.join(MERGES)}")
    try:
        vocabulary = {str(token): int(i) for token, i in json.loads(path.read_text(encoding="utf-8")).items()}
        lines = beside.read_text(encoding="utf-8").split("\n")
        merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
        model = models.BPE(vocabulary, merges)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} and {beside.name} are not GPT-2's vocabulary: {error}") from None
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    if END in vocabulary:
        made.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    end = END if END in vocabulary else None
    return made, Settings(bos_token=end, eos_token=end)


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split(" ")
    return left, right
