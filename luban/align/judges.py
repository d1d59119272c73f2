"""Judges by name, a reward model among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from luban.align.scoring import RewardModel
from luban.core.artifact import MANIFEST, read_manifest
from luban.core.errors import UsageError
from luban.core.hashing import data_sha256
from luban.evals.backends.base import Backend
from luban.evals.backends.local import LocalBackend
from luban.evals.backends.source import local_backend
from luban.evals.judges.base import Grade, Judge, Judgement, Pair, Single
from luban.evals.judges.model import JudgeTemplate, ModelJudge, load_template
from luban.evals.judges.rules import RuleJudge
from luban.evals.run import EvalOptions, device_of, open_backend
from luban.load.model import load_model
from luban.models.head.rows import Value

SMALL = 10**9  # parameters of a model that is asked by likelihood: such a model seldom keeps a format


class RewardJudge:
    """A reward model: the answer with the higher score is the better one; a grade is its score."""

    def __init__(self, model: RewardModel, identity: str):
        self.model, self.name, self.identity = model, model.model.name, identity

    def compare(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `Judge`."""
        found = self.grade([Single(prompt=p.prompt, answer=text) for p in pairs for text in (p.first, p.second)])
        judged = []
        for one, other in zip(found[::2], found[1::2], strict=True):
            first, second = one.grade or 0.0, other.grade or 0.0
            verdict = "tie" if first == second else "first" if first > second else "second"
            judged.append(Judgement(verdict=verdict, text=f"{first:.4f} {second:.4f}"))
        return judged

    def grade(self, answers: Sequence[Single]) -> list[Grade]:
        """See `Judge`."""
        return [Grade(grade=self.model.score(one.prompt, one.answer)) for one in answers]


def open_judge(
    name: str,
    options: EvalOptions,
    *,
    template: str | JudgeTemplate = "",
    model_name: str = "",
    seed: int = 0,
    sample: int = 0,
    opened: dict[str, Backend | RewardJudge] | None = None,
) -> Judge:
    """The judge behind a name: rule:NAME (rule alone: rule:longest), a reward model's run, another model, or an address.

    Args:
        template: how a model is asked, a shipped name or a .toml file; empty: default, of small local models likelihood.
        model_name: its name at an address.
        opened: models by name, which several judges share.

    Raises:
        UsageError: an empty name, an unknown rule; what loading a model raises.
    """
    if not name:
        raise UsageError("name a judge: --judge MODEL, rule:longest or the address of a server")
    if name == "rule" or name.startswith("rule:"):
        name = "rule:longest" if name == "rule" else name
        return RuleJudge(name.removeprefix("rule:"))
    opened = {} if opened is None else opened
    if name not in opened:
        opened[name] = _open(name, replace(options, model_name=model_name, adapter=None))
    found = opened[name]
    if isinstance(found, RewardJudge):
        return found
    small = isinstance(found, LocalBackend) and sum(p.numel() for p in found.model.module.parameters()) < SMALL
    chosen = template or ("likelihood" if small else "default")
    return ModelJudge(found, load_template(chosen) if isinstance(chosen, str) else chosen, seed=seed, sample=sample)


def _open(name: str, options: EvalOptions) -> Backend | RewardJudge:
    if name.startswith(("http://", "https://")):
        return open_backend(name, options)[0]
    loaded = load_model(name, device_of(options.device))
    if not isinstance(loaded.spec.head, Value):
        return local_backend(loaded, precision=options.precision)
    known = (Path(name) / MANIFEST).is_file()
    identity = read_manifest(name).content_hash if known else data_sha256(str(Path(name).resolve()))
    return RewardJudge(RewardModel(loaded), identity)
