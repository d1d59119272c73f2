"""One vocabulary of every kind that can be trained or read, made here."""

from __future__ import annotations

import base64
import json
import random
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llama_vocabulary import llama_vocabulary
from tokenizers import decoders, models, normalizers, pre_tokenizers

from luban.tokenizer.algorithms import ALGORITHMS
from luban.tokenizer.cutting import Cutting
from luban.tokenizer.importing.artifact import import_tokenizer
from luban.tokenizer.importing.sentencepiece import Model, build
from luban.tokenizer.settings import Settings
from luban.tokenizer.tokenizer import Tokenizer
from luban.tokenizer.train import train_tokenizer

STDLIB = Path(sysconfig.get_paths()["stdlib"])
CONTROL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = [
    *"abcdefghijklmnopqrstuvwxyz0123456789.,!?-'\"$[]#你好世",
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789你"),
    "the",
    "hello",
    "world",
    "token",
    "##iz",
    "##ation",
    "##er",
    "caf",
    "naive",
    "uni",
    "##form",
]
CASED = ["Hello", "World", "Caf", "Café", *"ABCDEFGH", *(f"##{c}" for c in "éABC")]


IDENTITY = {"normalization_rule_name": "identity"}
SYMBOLS = {"user_defined_symbols": ["<sep>", "<sep><sep>", "ab", "##"]}
OPTIONS = {
    "unigram": {},
    "unigram-bytes": {"byte_fallback": True, "character_coverage": 0.995},
    "unigram-identity": IDENTITY,
    "unigram-symbols": {**SYMBOLS, "byte_fallback": True},
    "unigram-suffix": {"treat_whitespace_as_suffix": True},
    "unigram-plain": {**IDENTITY, "add_dummy_prefix": False, "remove_extra_whitespaces": False, "byte_fallback": True},
    "unigram-phrases": {"split_by_whitespace": False, "byte_fallback": True},
    "unigram-folded": {"normalization_rule_name": "nmt_nfkc_cf", "control_symbols": ["[CLS]", "[SEP]"]},
    "unigram-names": {
        "bos_piece": "[BOS]",
        "eos_piece": "[EOS]",
        "unk_piece": "[UNK]",
        "unk_surface": "??",
        "pad_id": 3,
    },
    "bpe": {"model_type": "bpe"},
    "bpe-identity": {"model_type": "bpe", **IDENTITY, "byte_fallback": True},
    "bpe-symbols": {
        "model_type": "bpe",
        **SYMBOLS,
        **IDENTITY,
        "byte_fallback": True,
        "remove_extra_whitespaces": False,
    },
    "bpe-symbols-rules": {"model_type": "bpe", **SYMBOLS, "control_symbols": ["[CLS]"], "add_dummy_prefix": False},
    "bpe-suffix": {"model_type": "bpe", "treat_whitespace_as_suffix": True, "byte_fallback": True},
    "bpe-plain": {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "normalization_rule_name": "nfkc",
        "byte_fallback": True,
    },
}


def lines() -> list[str]:
    code = [line for name in ("argparse.py", "textwrap.py") for line in (STDLIB / name).read_text().splitlines()]
    return [
        *code,
        *["春眠不觉晓，处处闻啼鸟。 Ünïcödé naïve café — “quotes” 😀 αβγ гд हिन्दी में 한국어"] * 20,
        *["[CLS] <s> ab ##"] * 5,
    ]


def sentencepiece_model(folder: Path, options: Mapping[str, Any]) -> Path:
    """A SentencePiece model of 1,000 pieces, unigram where the options don't say otherwise."""
    spm = pytest.importorskip("sentencepiece")
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines()),
        model_prefix=str(folder / "m"),
        num_threads=1,
        minloglevel=2,
        vocab_size=1000,
        **{"model_type": "unigram", **options},
    )
    return folder / "m.model"


def tekken(ranks: int, special: list[str] | None, **config) -> tuple[dict, dict[bytes, int]]:
    """A vocabulary whose ranks behind the bytes are pairs of what stands before them."""
    rng = random.Random(3)
    tokens = [bytes([byte]) for byte in range(256)]
    common = [t for t in tokens if chr(t[0]) in " etaoinshr/.\n"] + [b" t", "é".encode()[:1]]
    while len(tokens) < ranks:
        made = rng.choice(common) + rng.choice(common)
        if len(made) < 9 and made not in tokens:
            tokens.append(made)
            common.append(made)
    data = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
            "version": "v3",
            "default_vocab_size": ranks - 20 + 30,
            "default_num_special_tokens": 30,
            **config,
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)
        ],
    }
    if special is not None:
        data["special_tokens"] = [
            {"rank": i, "token_str": token, "is_control": True} for i, token in enumerate(special)
        ]
    return data, {token: i for i, token in enumerate(tokens[: ranks - 20])}


def trained(algorithm: str, cut: Cutting | None = None) -> Callable[[Path], Tokenizer]:
    """A maker of one of our own vocabularies."""
    size = 700 if algorithm == "wordpiece" else 480
    options = {} if cut is None else {"cut": cut}
    return lambda folder: train_tokenizer(lines()[:400], folder / "t", algorithm=algorithm, vocab_size=size, **options)


def imported(options: Mapping[str, Any]) -> Callable[[Path], Tokenizer]:
    """A maker of an imported SentencePiece vocabulary."""
    return lambda folder: import_tokenizer(sentencepiece_model(folder, options), folder / "t")


def _file(name: str, content: str) -> Callable[[Path], Tokenizer]:
    def make(folder: Path) -> Tokenizer:
        (folder / name).write_text(content, encoding="utf-8")
        return import_tokenizer(folder / name, folder / "t")

    return make


def tiktoken_ranks(folder: Path) -> Tokenizer:
    """A rank file with the bytes and a few pairs."""
    ranks = tekken(400, None)[1]
    content = b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())
    (folder / "x.tiktoken").write_bytes(content)
    return import_tokenizer(folder / "x.tiktoken", folder / "t")


def gguf_pieces(folder: Path) -> Tokenizer:
    """What a GGUF file of a LLaMA vocabulary gives."""
    pieces = [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        *((f"<0x{b:02X}>", 0.0, 6) for b in range(256)),
        *((piece, -float(i), 1) for i, piece in enumerate(["▁", *"theo", "th", "▁th", "the", "▁the", "▁▁"])),
    ]
    return Tokenizer(*build(Model(pieces, kind=2, byte_fallback=True, remove_extra_whitespaces=False)))


def library(
    model: models.Model,
    decoder: decoders.Decoder,
    normalizer: normalizers.Normalizer | None = None,
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None,
) -> Callable[[Path], Tokenizer]:
    """A `tokenizer.json` with other parts, as found in directories of Hugging Face."""

    def make(folder: Path) -> Tokenizer:
        made = tokenizers.Tokenizer(model)
        made.decoder = decoder
        made.add_special_tokens(["<s>"])
        if normalizer is not None:
            made.normalizer = normalizer
        if pre_tokenizer is not None:
            made.pre_tokenizer = pre_tokenizer
        return Tokenizer(made, Settings())

    return make


def _llama(folder: Path) -> Tokenizer:
    """LLaMA 2's parts: bytes, a space before the text, and its removal after joining."""
    return Tokenizer(llama_vocabulary(), Settings())


_SCORED = [
    ("<unk>", 0.0),
    ("<s>", 0.0),
    *((piece, -1.0 - i) for i, piece in enumerate(["▁", "▁the", "▁ro", "w", "the", ".", "ro"])),
]
_SUFFIXED = {
    token: i for i, token in enumerate(["<unk>", "<s>", *"therow", *(f"{c}</w>" for c in "therow."), "the</w>"])
}
VOCABULARIES: dict[str, Callable[[Path], Tokenizer]] = {
    **{algorithm: trained(algorithm) for algorithm in sorted(ALGORITHMS)},
    **{
        f"{algorithm}-white": trained(algorithm, Cutting(digits="single", white_runs=8))
        for algorithm in ("bpe", "charbpe", "wordpiece")
    },
    **{f"sentencepiece-{name}": imported(options) for name, options in OPTIONS.items()},
    "bert": _file("vocab.txt", "".join(f"{piece}\n" for piece in [*CONTROL, *PIECES])),
    "tekken": _file("tekken.json", json.dumps(tekken(500, None)[0])),
    "tiktoken": tiktoken_ranks,
    "gguf": gguf_pieces,
    "llama": _llama,
    "metaspace": library(models.Unigram(_SCORED, 0), decoders.Metaspace(), None, pre_tokenizers.Metaspace()),
    "suffixed": library(models.BPE(_SUFFIXED, [], unk_token="<unk>", end_of_word_suffix="</w>"), decoders.BPEDecoder()),
}
