"""What is cut out of a generated answer before it is scored."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field

from luban.core import sandbox
from luban.core.errors import ConfigError
from luban.core.metrics.numbers import last_number
from luban.core.registry import Registry, Variant

FILTERS = Registry(
    "filter",
    {
        "regex": "luban.evals.filters:Regex",
        "strip": "luban.evals.filters:Strip",
        "lower": "luban.evals.filters:Lower",
        "first_line": "luban.evals.filters:FirstLine",
        "until": "luban.evals.filters:Until",
        "remove": "luban.evals.filters:Remove",
        "remove_punctuation": "luban.evals.filters:RemovePunctuation",
        "number": "luban.evals.filters:LastNumber",
        "code": "luban.evals.filters:Code",
    },
)


class Filter(Variant):
    """Base of filters."""

    registry = FILTERS

    def apply(self, text: str) -> str:
        """What is left of the text."""
        raise NotImplementedError


def _pattern(source: str) -> re.Pattern[str]:
    try:
        return re.compile(source)
    except re.error as error:
        raise ConfigError(f"{source!r} is no regular expression: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Regex(Filter):
    """The first or last match of a regular expression: its first group that took part, or all of it."""

    pattern: str
    which: str = "first"  # or last
    fallback: str = "[invalid]"  # where nothing matches

    def __post_init__(self):
        _pattern(self.pattern)
        if self.which not in ("first", "last"):
            raise ConfigError(f"which is first or last, {self.which!r} given")

    def apply(self, text: str) -> str:
        """The match."""
        found = list(_pattern(self.pattern).finditer(text))
        if not found:
            return self.fallback
        match = found[0 if self.which == "first" else -1]
        return next((group for group in match.groups() if group is not None), match[0]).strip()


@dataclass(frozen=True, kw_only=True)
class Strip(Filter):
    """No white space around it."""

    def apply(self, text: str) -> str:
        """The text without."""
        return text.strip()


@dataclass(frozen=True, kw_only=True)
class Lower(Filter):
    """In lower case."""

    def apply(self, text: str) -> str:
        """The text in lower case."""
        return text.lower()


@dataclass(frozen=True, kw_only=True)
class FirstLine(Filter):
    """The first line that isn't blank."""

    def apply(self, text: str) -> str:
        """The line, without white space around it."""
        return next((line.strip() for line in text.splitlines() if line.strip()), "")


@dataclass(frozen=True, kw_only=True)
class Until(Filter):
    """What stands before the first of some strings."""

    stop: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The text up to there."""
        return text[: min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=len(text))]


@dataclass(frozen=True, kw_only=True)
class Remove(Filter):
    """Without the matches of a regular expression."""

    pattern: str

    def __post_init__(self):
        _pattern(self.pattern)

    def apply(self, text: str) -> str:
        """The text without them."""
        return _pattern(self.pattern).sub("", text)


@dataclass(frozen=True, kw_only=True)
class RemovePunctuation(Filter):
    """Without ASCII punctuation."""

    drop: str = field(default=string.punctuation)  # the characters

    def apply(self, text: str) -> str:
        """The text without them."""
        return text.translate({ord(c): None for c in self.drop})


@dataclass(frozen=True, kw_only=True)
class LastNumber(Filter):
    """The number behind the last ####, else the last number."""

    fallback: str = "[invalid]"

    def apply(self, text: str) -> str:
        """The number in plain digits."""
        found = last_number(text)
        return self.fallback if found is None else f"{found.normalize():f}"


@dataclass(frozen=True, kw_only=True)
class Code(Filter):
    """The code in its fenced blocks, or all of it."""

    def apply(self, text: str) -> str:
        """The code."""
        return sandbox.code_of(text)
