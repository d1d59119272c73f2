"""Rewards that check an answer: 1 where it is right, else 0."""

from __future__ import annotations

import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from decimal import Decimal, InvalidOperation

from luban.align.rewards.base import Answer
from luban.core.errors import ConfigError, DataError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
CODE = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)
MEMORY = 1 << 30  # bytes that a test's process may take
WRITTEN = 1 << 24  # bytes of a file that it may write


def last_number(text: str) -> Decimal | None:
    """The number behind the last `####`, as in GSM8K, else the last number of the text."""
    marked = text.rpartition("####")[2] if "####" in text else text
    found = NUMBER.findall(marked)
    if not found:
        return None
    try:
        return Decimal((found[0] if "####" in text else found[-1]).replace(",", ""))
    except InvalidOperation:
        return None


class GSM8K:
    """Whether the answer's final number is that of the row's `answer` (Cobbe et al. 2021)."""

    name = "gsm8k"

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0. Raises DataError for a row without a number to compare with."""
        return [self._score(answer) for answer in answers]

    def _score(self, answer: Answer) -> float:
        right = last_number(str(answer.row.get("answer", "")))
        if right is None:
            raise DataError("the reward gsm8k needs an `answer` with a number in every row of the prompts")
        return float(last_number(answer.text) == right)


class Pattern:
    """Whether a regular expression is found in the answer. Raises ConfigError for one that isn't valid."""

    def __init__(self, pattern: str):
        self.name = "regex"
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"regex:{pattern} is no regular expression: {error}") from None

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0."""
        return [float(self.pattern.search(answer.text) is not None) for answer in answers]


class UnitTests:
    """Whether the answer's Python code passes the row's `tests`, in a process with limits on time, memory and files.

    The process is isolated from Python's user packages and the environment, not from the file system or the network: run
    answers of a model that isn't trusted in a container.
    """

    name = "unit_tests"

    def __init__(self, timeout: float):
        self.timeout = timeout

    def scores(self, answers: Sequence[Answer]) -> list[float]:
        """1 or 0. Raises DataError for a row without tests."""
        return [float(self.passes(answer.text, answer.row.get("tests"))) for answer in answers]

    def passes(self, text: str, tests: object) -> bool:
        """True if the code in the answer's fenced blocks (or the whole answer) and the tests run without an error."""
        if not isinstance(tests, str) or not tests.strip():
            raise DataError("the reward unit_tests needs `tests`, Python code, in every row of the prompts")
        code = "\n".join(CODE.findall(text)) or text
        passed = secrets.token_hex(8)  # printed behind the tests; an answer can't know it beforehand
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-c", f"{code}\n\n{tests}\nprint('{passed}', end='')"],
                    cwd=folder,
                    env={},
                    stdin=subprocess.DEVNULL,
                    stdout=printed,  # a file, whose size is limited
                    stderr=subprocess.DEVNULL,
                    preexec_fn=self._limit,
                    start_new_session=True,
                )
            except ValueError:  # a NUL character in the code
                return False
            try:
                process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                pass
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
                process.wait()
            printed.seek(0)
            return process.returncode == 0 and printed.read().endswith(passed.encode())

    def _limit(self) -> None:
        seconds = max(1, int(self.timeout) + 1)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
