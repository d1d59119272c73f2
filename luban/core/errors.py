"""Errors written for the person who meets them: what was wrong, where, what would be right."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class LubanError(Exception):
    """Anything Luban refuses. The command line prints it as one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(LubanError):
    """A command line or recipe that cannot be understood."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration field that is unknown, ill-typed or out of range."""


class DataError(LubanError):
    """Input data that is missing, empty, corrupt or too small."""


class ArtifactError(LubanError):
    """A directory that is not the finished artifact it was taken for."""


class LineageError(ArtifactError):
    """Two artifacts whose ancestry does not fit together."""


class UnsupportedError(LubanError):
    """A combination that makes no sense, or that this machine cannot run."""


class TrainingError(LubanError):
    """Training that had to stop; the message names the last good checkpoint."""


class UnfinishedError(LubanError):
    """Work that stopped before its end through no fault of its input; what was done is kept, and the same command resumes it."""


class MissingExtra(LubanError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str, needed_for: str):
        super().__init__(
            f"{needed_for} needs the package '{package}', which is not installed: pip install 'luban[{extra}]'"
        )
        self.needs = (package, extra, needed_for)

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str]]:
        """Pickled by its parts, so that it comes back from a worker."""
        return type(self), self.needs


def nearest(word: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest option, or the sorted options when none is close."""
    known = sorted(options)
    return closest(word, known) or (f" (known: {', '.join(known)})" if known else "")


def closest(word: str, options: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest option in any case, or nothing when none is close."""
    known = {option.lower(): option for option in sorted(options)}
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f" (did you mean '{known[close[0]]}'?)" if close else ""


def problem(error: Exception) -> str:
    """What reading JSON or TOML ran into, in words: Python's own speak of its functions and repeat a missing key alone."""
    if isinstance(error, KeyError):
        return f"it has no field {error.args[0]!r}"
    if isinstance(error, (TypeError, AttributeError, IndexError)):
        unknown = re.search(r"unexpected keyword argument ('\w+')", str(error))
        missing = re.search(r"missing \d+ required .*?arguments?: (.+)", str(error))
        if unknown or missing:
            return f"unknown field {unknown[1]}" if unknown else f"it has no field {missing[1]}"  # type: ignore[index]
        return "a field holds a value of another type, or too few of them"
    return str(error)
