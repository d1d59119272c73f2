"""SentencePiece `.model` files, BPE and unigram (Kudo and Richardson 2018; field numbers: sentencepiece_model.proto).

What the `tokenizers` library does otherwise than SentencePiece is put right where a tokenizer is opened
(luban.tokenizer.exact): text that spells special tokens, normalisation by rules, and bytes that are no text.

One departure stays: a unigram model's scores are added in 64 bits, in SentencePiece in 32, which for texts of more than
100,000 characters can choose another of two segmentations whose scores are nearly equal, not always the better one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from luban.core.errors import DataError, UnsupportedError, problem
from luban.tokenizer.charsmap import charsmap
from luban.tokenizer.exact import SPACE
from luban.tokenizer.importing.protobuf import fields
from luban.tokenizer.settings import Settings

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # piece types
UNIGRAM, BPE = 1, 2  # model types
USER_SCORE = -0.1  # of a user-defined piece in a unigram model: above every other, so that it is always taken
EVERY = 1 << 20  # spaces at the beginning of a text, more than there can be


@dataclass
class Model:
    """A `.model` file's fields that matter for encoding and decoding."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # (piece, score, type) by id
    kind: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""  # precompiled normalisation
    add_dummy_prefix: bool = True  # a space before the text
    remove_extra_whitespaces: bool = True
    whitespace_as_suffix: bool = False  # the space that belongs to a word stands behind it
    escape_whitespaces: bool = True  # spaces are written as ▁
    denormalised: bool = False  # rules for decoding
    unknown_surface: str = " \u2047 "  # text of an unknown piece
    roles: dict[str, str] = field(default_factory=lambda: {"bos": "<s>", "eos": "</s>", "pad": "<pad>"})  # role → piece

    def of_kinds(self, *kinds: int) -> list[str]:
        """The pieces of some types, by id."""
        return [piece for piece, _, kind in self.pieces if kind in kinds]


def parse(path: Path) -> Model:
    """Read a `.model` file. Raises DataError where it is none."""
    model = Model()
    try:
        for number, value in fields(path.read_bytes()):
            if number == 1:
                piece = dict(fields(value))
                model.pieces.append((piece[1].decode(), float(piece.get(2, 0.0)), int(piece.get(3, NORMAL))))
            elif number == 2:
                trainer = dict(fields(value))
                model.kind = int(trainer.get(3, UNIGRAM))
                model.byte_fallback = bool(trainer.get(35, 0))
                model.whitespace_as_suffix = bool(trainer.get(24, 0))
                model.unknown_surface = trainer[44].decode() if 44 in trainer else model.unknown_surface
                for number, role in ((46, "bos"), (47, "eos"), (48, "pad")):
                    model.roles[role] = trainer[number].decode() if number in trainer else model.roles[role]
            elif number == 3:
                spec = dict(fields(value))
                model.charsmap = bytes(spec.get(2, b""))
                model.add_dummy_prefix = bool(spec.get(3, 1))
                model.remove_extra_whitespaces = bool(spec.get(4, 1))
                model.escape_whitespaces = bool(spec.get(5, 1))
            elif number == 5:
                model.denormalised = bool(dict(fields(value)).get(2, b""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a SentencePiece model: {problem(error)}") from None
    if not model.pieces:
        raise DataError(f"{path} is not a SentencePiece model: it has no pieces")
    return model


def read(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """Raises DataError where the file is none, UnsupportedError for what cannot be imported exactly."""
    model = parse(path)
    try:
        return build(model)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path} cannot be imported: {error}") from None


def build(model: Model) -> tuple[tokenizers.Tokenizer, Settings]:
    """The vocabulary of a BPE or unigram model, and the roles of its tokens. Raises UnsupportedError for other kinds."""
    _check(model)
    made = tokenizers.Tokenizer(_unigram(model) if model.kind == UNIGRAM else _bpe(model))
    made.normalizer = _normalizer(model)
    splits = _word_splits(model) if model.kind == UNIGRAM else _user_splits(model)
    if splits:
        made.pre_tokenizer = pre_tokenizers.Sequence(splits)
    made.decoder = _decoder(model)
    made.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in model.of_kinds(CONTROL)])
    return made, _settings(model)


def _check(model: Model) -> None:
    if model.kind not in (UNIGRAM, BPE):
        raise UnsupportedError("a SentencePiece word or character model; only BPE and unigram can be imported")
    if not model.escape_whitespaces:
        raise UnsupportedError("its spaces are not written as ▁ (escape_whitespaces)")
    if model.denormalised:
        raise UnsupportedError("it has rules for decoding (denormalizer_spec)")
    if model.kind == UNIGRAM and model.of_kinds(UNUSED):
        raise UnsupportedError("some of its pieces are marked unused")
    rules = charsmap(model.charsmap) if model.charsmap else str
    changed = [piece for piece in model.of_kinds(USER) if rules(piece) != piece or " " in piece]
    if changed:
        raise UnsupportedError(f"its own normalisation would change the user-defined symbol {changed[0]!r}")


def _unigram(model: Model) -> models.Unigram:
    unknown = next((i for i, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN), None)
    scored = [(piece, USER_SCORE if kind == USER else score) for piece, score, kind in model.pieces]
    return models.Unigram(scored, unknown, model.byte_fallback)


def _bpe(model: Model, *, whole: bool | None = None) -> models.BPE:
    """SentencePiece merges the adjacent pair whose union scores highest: listed as pairs in that order.

    Args:
        whole: whether a word that is a piece is that piece; by default where user-defined pieces stand alone as words.
    """
    ids = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    merges, users = [], model.of_kinds(USER)
    for index, (piece, score, kind) in enumerate(model.pieces):
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(left, right) for left, right in pairs if left in ids and right in ids]
        if kind == UNUSED and pairs:
            raise UnsupportedError(f"its piece {piece!r} is marked unused, and others are merged from it")
        if kind == NORMAL:
            merges += [(-score, index, ids[left], ids[right], left, right) for left, right in pairs]
    ordered = [(left, right) for *_, left, right in sorted(merges)]
    unknown = model.of_kinds(UNKNOWN)
    return models.BPE(
        ids,
        ordered,
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
        ignore_merges=bool(users) if whole is None else whole,
    )


def _word_splits(model: Model) -> list[pre_tokenizers.PreTokenizer]:
    """Words, where no piece of a unigram model spans two: they are independent then, and short ones are found fast."""
    pieces = model.of_kinds(NORMAL, USER)
    inner = (piece[:-1] if model.whitespace_as_suffix else piece[1:] for piece in pieces)
    if SPACE not in pieces or any(SPACE in part for part in inner):
        return []
    behaviour = "merged_with_previous" if model.whitespace_as_suffix else "merged_with_next"
    return [pre_tokenizers.Split(SPACE, behavior=behaviour)]


def _user_splits(model: Model) -> list[pre_tokenizers.PreTokenizer]:
    """User-defined pieces of a BPE model as words of their own, the longest first.

    A word that is a piece is then taken whole, which must not happen to a text that spells `</s>`: where such a text is a
    word by itself, it is cut behind its first token, which changes no other token.
    """
    users = sorted(model.of_kinds(USER), key=lambda piece: (-len(piece), piece))
    if not users:
        return []
    alone = pre_tokenizers.Split(Regex("|".join(map(_escaped, users))), behavior="isolated")
    plain = tokenizers.Tokenizer(_bpe(model, whole=False))
    rests = defaultdict(list)
    for piece in model.of_kinds(CONTROL, UNKNOWN, BYTE):
        end = plain.encode(piece, add_special_tokens=False).offsets[0][1] if len(piece) > 1 else 0
        if end:
            end = end if end < len(piece) else 1
            rests[piece[:end]].append(piece[end:])
    heads = [rf"{_escaped(head)}(?=(?:{'|'.join(map(_escaped, rest))})\z)" for head, rest in sorted(rests.items())]
    return [alone, pre_tokenizers.Split(Regex(rf"\A(?:{'|'.join(heads)})"), behavior="isolated")] if heads else [alone]


def _escaped(text: str) -> str:
    """`text` in a regular expression of Oniguruma."""
    return re.sub(r"([\\^$.|?*+()\[\]{}#\-&~/ ])", r"\\\1", text)


def _normalizer(model: Model) -> normalizers.Normalizer:
    """Rules, then white space as `Normalizer::Normalize` of SentencePiece treats it."""
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix and not model.whitespace_as_suffix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))  # a ▁ in the text counts, too
    if model.add_dummy_prefix and model.whitespace_as_suffix:
        steps.append(normalizers.Replace(Regex(r"\z"), SPACE))
    return normalizers.Sequence(steps)


def _decoder(model: Model) -> decoders.Decoder:
    """Pieces joined, without the spaces that encoding put before the text."""
    unknown = model.of_kinds(UNKNOWN)
    steps: list[decoders.Decoder] = [decoders.Replace(piece, model.unknown_surface) for piece in unknown]
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        steps.append(decoders.Strip(SPACE, EVERY if model.remove_extra_whitespaces else 1, 0))
    return decoders.Sequence([*steps, decoders.Replace(SPACE, " ")])


def _settings(model: Model) -> Settings:
    controls, unknown = model.of_kinds(CONTROL), model.of_kinds(UNKNOWN)
    bos, eos, pad = (piece if piece in controls else None for piece in (model.roles[r] for r in ("bos", "eos", "pad")))
    return Settings(bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unknown[0] if unknown else None)
