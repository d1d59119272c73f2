"""SentencePiece `.model` files, BPE and unigram (Kudo and Richardson 2018; field numbers: sentencepiece_model.proto).

One departure: where the model's normalisation rewrites a character, the `tokenizers` library loses a
combining mark that follows it (it looks whole graphemes up). Models without normalisation, such as
LLaMA's, are not concerned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from luban.core.errors import DataError, UnsupportedError
from luban.tokenizer.importing.protobuf import fields
from luban.tokenizer.settings import Settings

SPACE = "\u2581"  # ▁, how SentencePiece writes a space
UNKNOWN, CONTROL, USER, BYTE = 2, 3, 4, 6  # piece types; 1 is normal, 5 unused
UNIGRAM, BPE = 1, 2  # model types


@dataclass
class Model:
    """A `.model` file's fields that matter for encoding."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)  # (piece, score, type) by id
    kind: int = UNIGRAM
    byte_fallback: bool = False
    charsmap: bytes = b""  # precompiled normalisation
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def first(self, kind: int) -> int | None:
        """The id of the first piece of a type."""
        return next((i for i, (_, _, found) in enumerate(self.pieces) if found == kind), None)


def parse(path: Path) -> Model:
    """Read a `.model` file. Raises DataError where it is none."""
    model = Model()
    try:
        for number, value in fields(path.read_bytes()):
            if number == 1:
                piece = dict(fields(value))
                model.pieces.append((piece[1].decode(), float(piece.get(2, 0.0)), int(piece.get(3, 1))))
            elif number == 2:
                trainer = dict(fields(value))
                model.kind = int(trainer.get(3, UNIGRAM))
                model.byte_fallback = bool(trainer.get(35, 0))
            elif number == 3:
                spec = dict(fields(value))
                model.charsmap = bytes(spec.get(2, b""))
                model.add_dummy_prefix = bool(spec.get(3, 1))
                model.remove_extra_whitespaces = bool(spec.get(4, 1))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a SentencePiece model: {error}") from None
    if not model.pieces:
        raise DataError(f"{path} is not a SentencePiece model: it has no pieces")
    return model


def read(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """Raises DataError where the file is none, UnsupportedError for word and character models."""
    model = parse(path)
    if model.kind not in (UNIGRAM, BPE):
        raise UnsupportedError(
            f"{path} is a SentencePiece word or character model: only BPE and unigram can be imported"
        )
    return build(model)


def build(model: Model) -> tuple[tokenizers.Tokenizer, Settings]:
    """The vocabulary of a BPE or unigram model, and the roles of its tokens."""
    unknown = model.first(UNKNOWN)
    made = tokenizers.Tokenizer(_unigram(model, unknown) if model.kind == UNIGRAM else _bpe(model, unknown))
    made.normalizer = _normalizer(model)
    if model.kind == UNIGRAM:
        # Words are independent of each other there, and the library's search wants them short.
        made.pre_tokenizer = pre_tokenizers.Split(SPACE, behavior="merged_with_next")
    strip = [decoders.Strip(" ", 1, 0)] if model.add_dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    for i, (piece, _, kind) in enumerate(model.pieces):
        if kind in (UNKNOWN, CONTROL):
            made.add_special_tokens([AddedToken(piece, special=True, normalized=False)])
        elif kind == USER:
            made.add_tokens([AddedToken(piece, special=False, normalized=False)])
        assert made.token_to_id(piece) == i or kind == UNKNOWN
    return made, _settings(model, unknown)


def _unigram(model: Model, unknown: int | None) -> models.Unigram:
    return models.Unigram([(piece, score) for piece, score, _ in model.pieces], unknown, model.byte_fallback)


def _bpe(model: Model, unknown: int | None) -> models.BPE:
    """SentencePiece merges the adjacent pair whose union scores highest: listed as pairs in that order."""
    ids = {piece: i for i, (piece, _, _) in enumerate(model.pieces)}
    merges = []
    for whole, (piece, score, kind) in enumerate(model.pieces):
        if kind in (CONTROL, UNKNOWN, BYTE):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-score, whole, ids[left], ids[right], left, right))
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    return models.BPE(ids, pairs, unk_token=None if unknown is None else model.pieces[unknown][0],
                      fuse_unk=True, byte_fallback=model.byte_fallback)  # fmt: skip


def _normalizer(model: Model) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _settings(model: Model, unknown: int | None) -> Settings:
    controls = [piece for piece, _, kind in model.pieces if kind == CONTROL]
    return Settings(
        bos_token="<s>" if "<s>" in controls else None,
        eos_token="</s>" if "</s>" in controls else None,
        pad_token="<pad>" if "<pad>" in controls else None,
        unk_token=None if unknown is None else model.pieces[unknown][0],
    )
