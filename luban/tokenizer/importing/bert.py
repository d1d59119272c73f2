"""BERT's `vocab.txt` (Devlin et al. 2019): one token a line, WordPiece over words and single punctuation signs."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from luban.core.artifact import read_table
from luban.core.errors import ArtifactError, DataError
from luban.tokenizer.settings import CONFIG, Settings, read_settings

UNKNOWN, PAD, SPECIAL = "[UNK]", "[PAD]", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
INSIDE = "##"  # marks a piece that continues a word
LONGEST = 100  # characters of a word; a longer one is unknown, as in BERT


def read(path: Path) -> tuple[tokenizers.Tokenizer, Settings]:
    """The vocabulary, with the choices of the `tokenizer_config.json` beside it.

    Without that file text is put into lower case, and loses its accents, where no piece has a capital letter.

    Raises:
        DataError: the file is no such vocabulary.
    """
    try:
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        config = read_table(path.with_name(CONFIG)) if path.with_name(CONFIG).is_file() else {}
        beside = read_settings(path.parent)
    except (UnicodeDecodeError, ArtifactError) as error:
        raise DataError(f"{path} is not BERT's vocabulary: {error}") from None
    pieces = [piece.rstrip("\r") for piece in pieces]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    if UNKNOWN not in vocabulary or not any(piece.startswith(INSIDE) for piece in pieces):
        raise DataError(
            f"{path} is not BERT's vocabulary: a line {UNKNOWN} and pieces that begin with {INSIDE} are needed"
        )
    cased = any(piece != piece.lower() for piece in pieces if not (piece.startswith("[") and piece.endswith("]")))
    lower = bool(config.get("do_lower_case", not cased))
    model = models.WordPiece(
        vocabulary, unk_token=UNKNOWN, continuing_subword_prefix=INSIDE, max_input_chars_per_word=LONGEST
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=lower,
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix=INSIDE, cleanup=True)
    found = [token for token in SPECIAL if token in vocabulary]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in found])
    pad = PAD if PAD in vocabulary else None
    return made, Settings(
        bos_token=beside.bos_token, eos_token=beside.eos_token, pad_token=beside.pad_token or pad, unk_token=UNKNOWN
    )
