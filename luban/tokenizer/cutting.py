"""How text is cut into words before a vocabulary sees it: digits, runs of white space, everything else."""

from __future__ import annotations

from dataclasses import dataclass

from luban.core.errors import ConfigError, nearest

DIGITS = {"groups": r"\p{N}{1,3}", "single": r"\p{N}", "runs": r"\p{N}{1,256}"}
LONGEST_RUN = 256  # characters after which any word ends, so that no input makes a model's search quadratic
WHITE = (" ", "\t", "\n")  # of which runs can be tokens


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """The choices of a vocabulary about digits and white space.

    Raises:
        ConfigError: an unknown choice or a length out of range.
    """

    digits: str = "groups"  # groups of up to three (cl100k's), single (LLaMA's), or whole runs (GPT-2's)
    white_runs: int = 0  # runs of up to so many spaces, tabs or line ends are one token each; 0 leaves them to training

    def __post_init__(self) -> None:
        if self.digits not in DIGITS:
            raise ConfigError(f"digits: unknown choice '{self.digits}'{nearest(self.digits, DIGITS)}")
        if not (self.white_runs == 0 or 2 <= self.white_runs <= LONGEST_RUN):
            raise ConfigError(f"white_runs: 0, or 2 to {LONGEST_RUN} characters, {self.white_runs} given")

    @property
    def pattern(self) -> str:
        """A regular expression (Oniguruma) of the words.

        Contractions · a word with the one character before it · digits · punctuation · line ends · spaces: the shape
        of OpenAI's cl100k_base. The last space before a word belongs to the word. Combining marks (vowel signs,
        accents) belong to the word that they stand in, as in o200k_base.
        """
        word = r"[^\r\n\p{L}\p{N}]?\p{L}[\p{L}\p{M}]{0,255}"
        head = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{word}|{DIGITS[self.digits]}"
        if self.white_runs:
            runs = "|".join(rf"\x{ord(white):02x}{{1,{self.white_runs}}}" for white in "\n\t")
            spaces = rf" {{1,{self.white_runs}}}"
            return rf"{head}| ?[^\s\p{{L}}\p{{N}}]{{1,256}}|{runs}|{spaces}(?!\S)|{spaces}|\s"
        return (
            rf"{head}| ?[^\s\p{{L}}\p{{N}}]{{1,256}}[\r\n]{{0,256}}|\s{{0,256}}[\r\n]{{1,256}}"
            r"|\s{1,256}(?!\S)|\s{1,256}"
        )

    @property
    def white_pieces(self) -> list[str]:
        """The runs that are tokens, shortest first."""
        return [white * length for length in range(2, self.white_runs + 1) for white in WHITE]


DEFAULT = Cutting()
