"""A model as a judge, in this process or behind an address."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from luban.core.config import from_dict, load_toml, to_dict
from luban.core.errors import ConfigError
from luban.core.hashing import data_sha256
from luban.evals.backends.base import Backend
from luban.evals.judges.base import SWAPPED, Grade, Judgement, Pair, Single, Verdict
from luban.evals.requests import Failed, Prompt, Request, Response, Score, Scored, Write, Written
from luban.evals.templates import text_of

TEMPLATES = Path(__file__).parent
LETTERS: Mapping[str, Verdict] = {"A": "first", "B": "second", "C": "tie"}
DIGITS = tuple("123456789")
NUMBERED = re.compile(r"(\d+)\s*[:.)-]\s*\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)
BATCH_END = "\n\nGive the verdict of each of the {count} pairs on a line of its own, as in 1: [[A]]."
TIE = 0.02  # log-probabilities of both letters nearer than this are a tie


@dataclass(frozen=True, kw_only=True)
class JudgeTemplate:
    """What a judge is asked, as a TOML file says it."""

    pair: str  # template over prompt, first, second, reference
    single: str  # template over prompt, answer, reference
    system: str = ""  # system message
    # text: the verdict is read from the answer; likelihood: the likelier letter, for small models; calibrated: the same, the
    # log-odds of both orders averaged, for models that like one letter whatever stands behind it
    method: str = "text"
    verdict: str = r"\[\[\s*([ABC])\s*\]\]"  # its last match says A, B or C (tie)
    grade: str = r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]"  # its last match is the grade, 1 to 10
    max_tokens: int = 256  # of the judge's answer
    temperature: float = 0.0  # of the judge's answer
    reversed_letters: bool = False  # A means the second answer: another way to ask
    batch: int = 1  # pairs in one prompt, each with a verdict on a line of its own

    def __post_init__(self):
        if self.batch < 1 or self.max_tokens < 1 or self.temperature < 0:
            raise ConfigError("batch and max_tokens must be at least 1, temperature at least 0")
        if self.method not in ("text", "likelihood", "calibrated"):
            raise ConfigError(f"method is text, likelihood or calibrated, {self.method!r} given")
        for name in ("verdict", "grade"):
            try:
                groups = re.compile(getattr(self, name)).groups
            except re.error as error:
                raise ConfigError(f"{name} is no regular expression: {error}") from None
            if groups != 1:
                raise ConfigError(f"{name} needs one group in parentheses, {getattr(self, name)!r} given")


def load_template(name: str) -> JudgeTemplate:
    """A template that ships (default, likelihood, calibrated) or a .toml file. Raises ConfigError for anything else."""
    path = TEMPLATES / f"{name}.toml"
    return from_dict(JudgeTemplate, load_toml(path if path.is_file() else Path(name)))


class ModelJudge:
    """Asks a model. A judgement that can't be read is None, never a guess.

    Args:
        backend: the model. template: how it is asked. seed, sample: of what is drawn, where the temperature isn't 0.
    """

    def __init__(self, backend: Backend, template: JudgeTemplate, *, seed: int = 0, sample: int = 0):
        self.backend, self.template, self.name = backend, template, backend.name
        self.seed, self.sample = seed, sample

    @property
    def identity(self) -> str:
        """See `Judge`."""
        return data_sha256([self.backend.identity, to_dict(self.template), self.seed, self.sample])

    def compare(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `Judge`."""
        if self.template.batch > 1 and self.template.method == "text":
            return self._compare_batches(pairs)
        fields = ("prompt", "first", "second", "reference")
        asked = [self._messages(self.template.pair, {name: getattr(pair, name) for name in fields}) for pair in pairs]
        if self.template.method != "text":
            return [self._likelier(each) for each in self._likelihoods(asked, ("A", "B"))]
        return [self._judgement(response) for response in self._ask(self._writes(asked))]

    def _compare_batches(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """Several pairs a prompt; verdicts are read by their numbers, a missing one is None."""
        fields = ("prompt", "first", "second", "reference")
        groups = [pairs[i : i + self.template.batch] for i in range(0, len(pairs), self.template.batch)]
        asked = []
        for group in groups:
            shown = [
                f"# Pair {number}\n{text_of(self.template.pair, {name: getattr(pair, name) for name in fields}).strip()}"
                for number, pair in enumerate(group, 1)
            ]
            body = "\n\n".join(shown) + BATCH_END.format(count=len(group))
            system = [{"role": "system", "content": self.template.system}] if self.template.system else []
            asked.append([*system, {"role": "user", "content": body}])
        found: list[Judgement] = []
        for group, response in zip(groups, self._ask(self._writes(asked)), strict=True):
            if not isinstance(response, Written):
                found += [Judgement(verdict=None, failed=getattr(response, "error", "no answer"))] * len(group)
                continue
            verdicts = {int(number): letter.upper() for number, letter in NUMBERED.findall(response.text)}
            for number in range(1, len(group) + 1):
                letter = verdicts.get(number)
                found.append(Judgement(verdict=self._meant(letter) if letter else None, text=response.text))
        return found

    def grade(self, answers: Sequence[Single]) -> list[Grade]:
        """See `Judge`."""
        fields = ("prompt", "answer", "reference")
        asked = [self._messages(self.template.single, {name: getattr(one, name) for name in fields}) for one in answers]
        if self.template.method != "text":
            return [self._expected(each) for each in self._likelihoods(asked, DIGITS)]
        return [self._read_grade(response) for response in self._ask(self._writes(asked))]

    def _messages(self, template: str, fields: dict[str, str]) -> Prompt:
        system = [{"role": "system", "content": self.template.system}] if self.template.system else []
        return [*system, {"role": "user", "content": text_of(template, fields).strip()}]

    def _writes(self, prompts: Sequence[Prompt]) -> list[Request]:
        chosen = {"max_tokens": self.template.max_tokens, "temperature": self.template.temperature}
        return [Write(prompt=prompt, seed=self.seed, sample=self.sample, **chosen) for prompt in prompts]

    def _ask(self, requests: Sequence[Request]) -> list[Response]:
        found: list[Response] = []
        for start in range(0, len(requests), self.backend.round_size):
            found += self.backend.respond(requests[start : start + self.backend.round_size])
        return found

    def _likelihoods(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[list[float] | Failed]:
        found = self._ask([Score(context=prompt, continuation=option) for prompt in prompts for option in options])
        rows = [found[i : i + len(options)] for i in range(0, len(found), len(options))]
        failed = [next((each for each in row if isinstance(each, Failed)), None) for row in rows]
        return [
            broken or [each.logprob for each in row if isinstance(each, Scored)]
            for row, broken in zip(rows, failed, strict=True)
        ]

    def _likelier(self, found: list[float] | Failed) -> Judgement:
        if isinstance(found, Failed):
            return Judgement(verdict=None, failed=found.error)
        first, second = found
        text = f"A {math.exp(first):.4f}, B {math.exp(second):.4f}"
        odds = second - first if self.template.reversed_letters else first - second
        margin = odds if self.template.method == "calibrated" else None
        if abs(odds) < TIE:
            return Judgement(verdict="tie", text=text, margin=margin)
        return Judgement(verdict="first" if odds > 0 else "second", text=text, margin=margin)

    def _expected(self, found: list[float] | Failed) -> Grade:
        if isinstance(found, Failed):
            return Grade(grade=None, failed=found.error)
        weights = [math.exp(each - max(found)) for each in found]
        mean = sum(w * int(d) for w, d in zip(weights, DIGITS, strict=True)) / sum(weights)
        return Grade(grade=mean, text=f"{mean:.3f}")

    def _meant(self, letter: str) -> Verdict:
        verdict = LETTERS[letter]
        return SWAPPED[verdict] if self.template.reversed_letters else verdict

    def _judgement(self, response: Response) -> Judgement:
        if not isinstance(response, Written):
            return Judgement(verdict=None, failed=getattr(response, "error", "no answer"))
        found = re.findall(self.template.verdict, response.text)
        if not found or found[-1].upper() not in LETTERS:
            return Judgement(verdict=None, text=response.text)
        return Judgement(verdict=self._meant(found[-1].upper()), text=response.text)

    def _read_grade(self, response: Response) -> Grade:
        if not isinstance(response, Written):
            return Grade(grade=None, failed=getattr(response, "error", "no answer"))
        found = re.findall(self.template.grade, response.text)
        grade = float(found[-1]) if found else math.nan
        return Grade(grade=grade if 1 <= grade <= 10 else None, text=response.text)
