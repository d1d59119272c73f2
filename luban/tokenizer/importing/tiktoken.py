"""tiktoken's rank files: a line a token, base64 of its bytes and its rank.

tiktoken merges whatever adjacent pair has the lowest rank as a whole; a library that merges listed pairs
gives the same ids when each token is listed as the last two parts that lower ranks alone split it into.
"""

from __future__ import annotations

import base64
import binascii
import itertools
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from luban.core.errors import DataError
from luban.tokenizer.settings import Settings

CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER, _SHORT = (
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
)
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Family:
    """Settings that a rank file doesn't contain."""

    pattern: str  # how text is cut into words
    special: dict[str, int]  # special tokens and their ids
    end: str  # which of them ends a text


_FIM = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
FAMILIES = {  # by the number of ranks
    50256: Family(_R50K, {"<|endoftext|>": 50256}, "<|endoftext|>"),
    100256: Family(CL100K, {**{t: 100257 + i for i, t in enumerate(_FIM)}, "<|endofprompt|>": 100276}, "<|endoftext|>"),
    199998: Family(_O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}, "<|endoftext|>"),
    128000: Family(
        CL100K,
        {
            "<|begin_of_text|>": 128000,
            "<|end_of_text|>": 128001,
            "<|start_header_id|>": 128006,
            "<|end_header_id|>": 128007,
            "<|eom_id|>": 128008,
            "<|eot_id|>": 128009,
            "<|python_tag|>": 128010,
        },
        "<|end_of_text|>",
    ),
}


def read(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """Raises DataError where the file holds no ranks.

    A file of unknown size is taken for one of cl100k's kind, with `<|endoftext|>` behind its last rank.
    """
    ranks = read_ranks(path)
    family = FAMILIES.get(len(ranks)) or Family(CL100K, {"<|endoftext|>": max(ranks.values()) + 1}, "<|endoftext|>")
    # Ids that a family leaves free between ranks and special tokens stay free.
    made = byte_bpe(ranks, family.pattern, family.special)
    begin = next((token for token in family.special if "begin" in token), None)
    return made, Settings(bos_token=begin, eos_token=family.end)


def byte_bpe(ranks: dict[bytes, int], pattern: str, special: dict[str, int], first: int = 0) -> tokenizers.Tokenizer:
    """A vocabulary that merges by rank within the words of a pattern.

    Args:
        ranks: token bytes → rank.
        pattern: a regular expression (Oniguruma) of the words.
        special: special tokens → ids.
        first: the id of rank 0.
    """
    spelled = {token: "".join(_SPELLING[byte] for byte in token) for token in ranks}
    vocabulary = {spelled[token]: first + rank for token, rank in ranks.items()}
    pairs = (split(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1)
    merges = [(spelled[pair[0]], spelled[pair[1]]) for pair in pairs if pair]
    made = tokenizers.Tokenizer(models.BPE({**vocabulary, **special}, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes → rank."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{path} is not a tiktoken rank file: {error}") from None
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(f"{path} is not a tiktoken rank file: {len(missing)} of the 256 bytes have no rank")
    return ranks


def split(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that ranks below the token's own leave of it, or None where they leave more."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(a + b, ranks[token]) for a, b in itertools.pairwise(parts)]
        best = min(range(len(found)), key=found.__getitem__)
        if found[best] >= ranks[token]:
            return None
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _byte_spelling() -> dict[int, str]:
    """GPT-2's printable character for each byte: itself where it is one, else from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


_SPELLING = _byte_spelling()
