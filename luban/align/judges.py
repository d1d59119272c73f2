"""Judges by name, a reward model among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luban.align.scoring import RewardModel
from luban.core.artifact import MANIFEST, read_manifest
from luban.core.errors import UsageError
from luban.core.hashing import data_sha256
from luban.evals.judges.base import Grade, Judge, Judgement, Pair, Single
from luban.evals.judges.model import ModelJudge, load_template
from luban.evals.judges.rules import RuleJudge
from luban.evals.run import EvalOptions, open_backend
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
    name: str, options: EvalOptions, *, template: str = "", model_name: str = "", seed: int = 0, sample: int = 0
) -> Judge:
    """The judge behind a name: rule:NAME, a reward model's run, another model, or an address.

    Args:
        template: how a model is asked, a shipped name or a .toml file; empty: default, of small local models likelihood.
        model_name: its name at an address.

    Raises:
        UsageError: an empty name, an unknown rule; what loading a model raises.
    """
    if not name:
        raise UsageError("name a judge: --judge MODEL, rule:longest or the address of a server")
    if name.startswith("rule:"):
        return RuleJudge(name.removeprefix("rule:"))
    if name.startswith(("http://", "https://")):
        backend, _ = open_backend(
            name, EvalOptions(model_name=model_name, api_key=options.api_key, timeout=options.timeout)
        )
        return ModelJudge(backend, load_template(template or "default"), seed=seed, sample=sample)
    if (Path(name) / MANIFEST).is_file() or Path(name).is_dir():
        loaded = load_model(name)
        if isinstance(loaded.spec.head, Value):
            known = (Path(name) / MANIFEST).is_file()
            identity = read_manifest(name).content_hash if known else data_sha256(str(Path(name).resolve()))
            return RewardJudge(RewardModel(loaded), identity)
    backend, _ = open_backend(name, EvalOptions(device=options.device, precision=options.precision))
    small = sum(p.numel() for p in backend.model.module.parameters()) < SMALL  # type: ignore[attr-defined]
    return ModelJudge(
        backend, load_template(template or ("likelihood" if small else "default")), seed=seed, sample=sample
    )
