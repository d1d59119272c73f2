"""What the byte-level algorithms share: how text is cut into words before any vocabulary sees it."""

from __future__ import annotations

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from luban.core.errors import ConfigError

# Contractions · a word with the one character before it · one to three digits · punctuation · line ends · spaces.
# The shape is that of OpenAI's cl100k_base; runs of spaces stay together, which source code needs.
# Words end after 256 characters at the latest, so that no input makes a model's search quadratic.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}{1,256}"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]{1,256}[\r\n]{0,256}"
    r"|\s{0,256}[\r\n]{1,256}"
    r"|\s{1,256}(?!\S)"
    r"|\s{1,256}"
)
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes as printable characters (GPT-2)


def bytelevel_tokenizer(model: models.Model) -> tokenizers.Tokenizer:
    """A tokenizer that cuts words by `WORDS`, spells them in bytes and joins bytes back without loss."""
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def require_room(vocab_size: int, smallest: int, parts: str) -> None:
    """Raise ConfigError when the vocabulary cannot even hold its fixed entries."""
    if vocab_size < smallest:
        raise ConfigError(f"vocabulary of {vocab_size} is too small: {parts} alone need {smallest}")
