"""The vocabulary inside a GGUF model file (llama.cpp's format), read with its own library.

Two kinds are known: "llama", SentencePiece pieces with scores, and "gpt2", byte-level BPE with listed merges,
whose `pre` names how text is cut into words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from luban.core.errors import DataError, MissingExtra, UnsupportedError
from luban.tokenizer.importing.sentencepiece import BPE, CONTROL, UNKNOWN, USER, Model, build
from luban.tokenizer.importing.tiktoken import CL100K, R50K
from luban.tokenizer.settings import Settings

KEYS = "tokenizer.ggml."
ONE_DIGIT = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
WORDS = {"gpt-2": R50K, "llama-bpe": CL100K, "llama3": CL100K, "smaug-bpe": CL100K, "gpt-4": CL100K,
         "qwen2": ONE_DIGIT, "stablelm2": ONE_DIGIT}  # fmt: skip


def read(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """Raises DataError where the file is no GGUF or holds no vocabulary, UnsupportedError for a kind not known."""
    found = _fields(path)
    kind, tokens = found.get("model"), found.get("tokens")
    if not tokens:
        raise DataError(f"{path} holds no vocabulary")
    if kind == "llama":
        return _pieces(found, tokens)
    if kind == "gpt2":
        return _merges(path, found, tokens)
    raise UnsupportedError(f"{path} holds a vocabulary of the kind '{kind}': llama and gpt2 can be imported")


def _pieces(found: dict[str, Any], tokens: list[str]) -> tuple[tokenizers.Tokenizer, Settings]:
    scores = found.get("scores") or [-float(i) for i in range(len(tokens))]
    kinds = found.get("token_type") or [1] * len(tokens)
    model = Model(pieces=list(zip(tokens, map(float, scores), map(int, kinds), strict=True)), kind=BPE, byte_fallback=True,
                  add_dummy_prefix=bool(found.get("add_space_prefix", True)), remove_extra_whitespaces=False)  # fmt: skip
    return build(model)[0], _settings(found, tokens)


def _merges(path: Path, found: dict[str, Any], tokens: list[str]) -> tuple[tokenizers.Tokenizer, Settings]:
    pattern = WORDS.get(found.get("pre", "gpt-2"))
    if pattern is None:
        raise UnsupportedError(f"{path} cuts words in the way of '{found['pre']}': known are {', '.join(WORDS)}")
    merges = [tuple(merge.split(" ")) for merge in found.get("merges") or ()]
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=pattern is CL100K)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} holds merges that do not fit its vocabulary: {error}") from None
    made = tokenizers.Tokenizer(model)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, found.get("token_type") or [1] * len(tokens), strict=True):
        if kind in (CONTROL, UNKNOWN):
            made.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER:
            made.add_tokens([AddedToken(token, special=False, normalized=False)])
    return made, _settings(found, tokens)


def _settings(found: dict[str, Any], tokens: list[str]) -> Settings:
    def token(role: str) -> str | None:
        number = found.get(f"{role}_token_id")
        return tokens[number] if isinstance(number, int) and 0 <= number < len(tokens) else None

    return Settings(bos_token=token("bos"), eos_token=token("eos"), pad_token=token("padding"),
                    unk_token=token("unknown"), chat_template=found.get("chat_template"))  # fmt: skip


def _fields(path: Path) -> dict[str, Any]:
    """The file's tokenizer fields, by their names without `tokenizer.ggml.`, and its chat template."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingExtra("gguf", "corpus", "reading a GGUF file") from None
    try:
        fields = GGUFReader(str(path)).fields
    except Exception as error:  # the library raises whatever its parsing meets
        raise DataError(f"{path} is not a GGUF file: {error}") from None
    found = {name.removeprefix(KEYS): field.contents() for name, field in fields.items() if name.startswith(KEYS)}
    if "tokenizer.chat_template" in fields:
        found["chat_template"] = fields["tokenizer.chat_template"].contents()
    return found
