"""The vocabulary in a GGUF file's metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama")."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from luban.core.errors import DataError, MissingExtra, UnsupportedError
from luban.core.log import warn
from luban.tokenizer.importing.sentencepiece import BPE, CONTROL, UNKNOWN, USER, Model, build
from luban.tokenizer.importing.tiktoken import CL100K
from luban.tokenizer.settings import Settings

KEY = "tokenizer.ggml."
ROLES = ("bos", "eos", "padding", "unknown")


def _bytes_of(*before: pre_tokenizers.PreTokenizer, words: bool) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    return pre_tokenizers.Sequence([*before, last])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {  # how text is cut, by `tokenizer.ggml.pre`
    "gpt-2": lambda: _bytes_of(words=True),
    "smollm": lambda: _bytes_of(pre_tokenizers.Digits(individual_digits=True), words=True),
    "llama-bpe": lambda: _bytes_of(_split(CL100K), words=False),
    "dbrx": lambda: _bytes_of(_split(CL100K), words=False),
    "qwen2": lambda: _bytes_of(_split(CL100K.replace("{1,3}", "")), words=False),
    "tekken": lambda: _bytes_of(_split(TEKKEN), words=False),
    "default": lambda: _bytes_of(
        *map(_split, (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")), words=False
    ),
}
SAME_WORDS = {  # other values of `pre` that cut words alike, as llama.cpp's loader has it
    **dict.fromkeys(("phi-2", "mpt", "olmo", "gigachat"), "gpt-2"),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "exaone"), "smollm"),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "stablelm2"), "qwen2"),
    "smaug-bpe": "dbrx",
}
BEGINS = ("llama-bpe", "tekken")  # whose texts begin with the begin token unless the file says otherwise


def read(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """The vocabulary of a GGUF file. Raises what `from_metadata` does, and DataError where the file is none."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingExtra("gguf", "corpus", "reading a GGUF vocabulary") from None
    try:
        fields = GGUFReader(str(path)).fields
    except Exception as error:  # the library raises whatever its parsing meets
        raise DataError(f"{path} is not a GGUF file: {error}") from None
    return from_metadata({name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")})


def from_metadata(metadata: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, Settings]:
    """The vocabulary and the roles of its tokens.

    Raises:
        DataError: the metadata holds no vocabulary, or a broken one.
        UnsupportedError: a kind of vocabulary, or a way of cutting words, that isn't built.
    """
    kind, tokens = metadata.get(KEY + "model"), metadata.get(KEY + "tokens")
    if not tokens:
        raise DataError("the GGUF metadata holds no vocabulary (tokenizer.ggml.tokens)")
    kinds = metadata.get(KEY + "token_type") or [1] * len(tokens)
    if kind == "gpt2":
        made = _byte_level(metadata, tokens, kinds)
    elif kind == "llama":
        scores = metadata.get(KEY + "scores") or [0.0] * len(tokens)
        prefix = metadata.get(KEY + "add_space_prefix", True)
        made, _ = build(
            Model(
                list(zip(tokens, scores, kinds, strict=True)),
                kind=BPE,
                byte_fallback=True,
                add_dummy_prefix=prefix,
                remove_extra_whitespaces=False,
            )
        )
    else:
        raise UnsupportedError(f"GGUF vocabulary '{kind}' isn't read; known: gpt2, llama")
    bos, eos, pad, unknown = (_role(metadata, tokens, role) for role in ROLES)
    turn = metadata.get(KEY + "eot_token_id")
    if bos is not None and begins_with_bos(
        metadata
    ):  # so that copies of the vocabulary, such as a tuned model's, say so
        single, pair = f"{bos} $A", f"{bos} $A {bos} $B"
        made.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=[(bos, metadata[KEY + "bos_token_id"])]
        )
    return made, Settings(
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unknown,
        stop_ids=() if turn is None else (turn,),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def begins_with_bos(metadata: Mapping[str, Any]) -> bool:
    """True if the model's texts begin with the BOS token; with SentencePiece vocabularies the default is true."""
    usual = metadata.get(KEY + "model") == "llama" or _words(metadata) in BEGINS
    return bool(metadata.get(KEY + "add_bos_token", usual))


def _words(metadata: Mapping[str, Any]) -> str:
    """Which of `WORDS` cuts words."""
    named = str(metadata.get(KEY + "pre", "default"))
    return SAME_WORDS.get(named, named)


def _role(metadata: Mapping[str, Any], tokens: list[str], role: str) -> str | None:
    index = metadata.get(f"{KEY}{role}_token_id")
    return tokens[index] if index is not None and 0 <= index < len(tokens) else None


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> tokenizers.Tokenizer:
    words = _words(metadata)
    if words not in WORDS:
        known = ", ".join((*WORDS, *SAME_WORDS))
        raise UnsupportedError(f"GGUF word pattern '{words}' isn't built; known: {known}")
    if KEY + "pre" not in metadata:
        warn(f"the GGUF metadata lacks {KEY}pre: words are cut by llama.cpp's default, which may not be the model's")
    merges = [tuple(line.split(" ")) for line in metadata.get(KEY + "merges", ())]
    try:
        model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=words in BEGINS)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"the GGUF metadata's vocabulary is broken: {error}") from None
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer, made.decoder = WORDS[words](), decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, UNKNOWN, USER):
            made.add_tokens([AddedToken(token, special=kind != USER, normalized=False)])
    return made
