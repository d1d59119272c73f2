"""How well a vocabulary fits texts: bytes a token, tokens a word, how much of it is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from luban.core.errors import DataError
from luban.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One text under one vocabulary."""

    name: str  # the file's name
    bytes: int  # UTF-8 bytes
    tokens: int  # token ids
    words: int  # runs of non-space characters
    used: int  # different ids that occur
    vocab_size: int  # ids there are
    longest: tuple[str, ...]  # the longest tokens that occur, longest first

    @property
    def bytes_per_token(self) -> float:
        """Compression: UTF-8 bytes a token carries."""
        return self.bytes / max(self.tokens, 1)

    @property
    def fertility(self) -> float:
        """Tokens a word is split into, on average."""
        return self.tokens / max(self.words, 1)


def measure(tokenizer: Tokenizer, path: Path) -> Fit:
    """Encode the file at `path` and count.

    Raises:
        DataError: no such file, or nothing in it.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist or is no file")
    text = path.read_bytes().decode("utf-8", "replace")
    if not text:
        raise DataError(f"{path} is empty")
    ids = [i for part in tokenizer.encode_batch(text.splitlines(keepends=True)) for i in part]
    spelled = sorted({tokenizer.decode([i]) for i in set(ids)}, key=lambda piece: (-len(piece), piece))
    return Fit(name=path.name, bytes=len(text.encode()), tokens=len(ids), words=len(text.split()), used=len(set(ids)),
               vocab_size=tokenizer.vocab_size, longest=tuple(spelled[:5]))  # fmt: skip


def table(fits: list[Fit]) -> str:
    """The measurements as aligned text."""
    lines = [f"{'text':<28} {'bytes':>10} {'tokens':>10} {'bytes/token':>12} {'tokens/word':>12} {'used':>8}  longest"]
    for fit in fits:
        longest = " ".join(repr(piece) for piece in fit.longest[:3])
        lines.append(f"{fit.name[:28]:<28} {fit.bytes:>10} {fit.tokens:>10} {fit.bytes_per_token:>12.3f} "
                     f"{fit.fertility:>12.3f} {fit.used / fit.vocab_size:>8.1%}  {longest}")  # fmt: skip
    return "\n".join(lines)
