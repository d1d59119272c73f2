"""Constitutional AI (Bai et al. 2022): answers criticised and revised by a model over principles, and its own soft preferences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luban.align.preferences import as_messages
from luban.align.prompts import prompt_of
from luban.align.writing import write_answers
from luban.core.artifact import ArtifactWriter
from luban.core.config import to_dict
from luban.core.errors import ConfigError, DataError, UnfinishedError
from luban.core.hashing import data_sha256, file_sha256
from luban.core.jsonl import parsed_rows, write_rows
from luban.core.metrics.calibration import calibration
from luban.core.seeding import generator
from luban.evals.backends.base import Backend
from luban.evals.checklist import Principle, Principles
from luban.evals.judges.pairs import Match
from luban.evals.requests import Prompt, Score, Scored
from luban.evals.store import ResponseStore, StoredBackend

LEAST, MOST = 0.4, 0.6  # of a label given after a chain of thought, which is surer than it is right (section 4.1)
LETTERS = ("A", "B")
COMPARE = """Consider this request and two answers to it.

Request: {prompt}

(A) {first}

(B) {second}

{principle} Which answer keeps to this principle better?"""
VERDICT = "\n\nReply with the letter alone, A or B."
REASON = "\n\nLet's think step by step, in a few sentences, before the letter is given."


@dataclass(frozen=True, kw_only=True)
class RevisionConfig:
    """How answers are revised."""

    rounds: int = 2  # critiques and revisions of each answer, each by a principle drawn
    max_tokens: int = 256  # of an answer, a critique, a revision
    temperature: float = 1.0  # of all three
    seed: int = 0  # of principles and samples

    def __post_init__(self):
        if self.rounds < 1 or self.max_tokens < 1:
            raise ConfigError(f"rounds and max_tokens must be at least 1, {self.rounds} and {self.max_tokens} given")


def _usable(principles: Principles) -> list[Principle]:
    """Those with requests for a critique and a revision. DataError for none."""
    found = [each for each in principles.principle if each.critique and each.revision]
    if not found:
        raise DataError("no principle has requests for a critique and a revision, which revising needs")
    return found


def revise(file: Path, backend: Backend, principles: Principles, out: Path, config: RevisionConfig) -> dict[str, Any]:
    """Let a model answer the prompts of a file, criticise and revise its answers, and write revisions.jsonl: `prompt`, `response`,
    `critique`, `revision` (the last ones), `steps`; `luban data feedback --use revised` makes training data of it. Rows in which one of
    the three is empty are left out and counted.

    Raises:
        DataError: a row without a prompt, no prompt, no principle with requests, or only empty answers.
        UnfinishedError: the model left requests unanswered; the same command asks again.
    """
    usable, prompts = _usable(principles), parsed_rows(file, prompt_of, "prompt")
    identity = {
        **asdict(config),
        "model": backend.identity,
        "principles": to_dict(principles),
        "prompts": file_sha256(file),
    }
    with (
        ArtifactWriter(out, kind="revisions", config=identity, seed=config.seed, resumable=True) as art,
        ResponseStore(art.path / "responses.jsonl", backend.identity) as store,
    ):
        stored = StoredBackend(backend, store, "revising")
        chats = [as_messages(prompt, "user") for prompt in prompts]
        answers = _written(stored, chats, config, 0)
        rows = [
            {"prompt": prompt, "response": answer, "critique": "", "revision": answer, "steps": []}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for number in range(config.rounds):
            drawn = [
                usable[generator(config.seed, "principle", number, i).integers(len(usable))] for i in range(len(rows))
            ]
            said = [
                [*chat, {"role": "assistant", "content": row["revision"]}]
                for chat, row in zip(chats, rows, strict=True)
            ]
            asked = [[*each, {"role": "user", "content": p.critique}] for each, p in zip(said, drawn, strict=True)]
            critiques = _written(stored, asked, config, 2 * number + 1)
            asked = [
                [*each, {"role": "assistant", "content": critique}, {"role": "user", "content": p.revision}]
                for each, critique, p in zip(asked, critiques, drawn, strict=True)
            ]
            revisions = _written(stored, asked, config, 2 * number + 2)
            for row, p, critique, revision in zip(rows, drawn, critiques, revisions, strict=True):
                row["steps"].append({"principle": p.id, "critique": critique, "revision": revision})
                row |= {"critique": critique, "revision": revision}
        whole = [row for row in rows if row["response"] and row["critique"] and row["revision"]]
        if not whole:
            raise DataError(
                f"{backend.identity[:12]} gave none of {len(rows)} prompts an answer, a critique and a revision"
            )
        write_rows(art.path / "revisions.jsonl", whole)
        changed = sum(row["response"] != row["revision"] for row in whole)
        figures = {"prompts": len(rows), "changed": changed, "empty": len(rows) - len(whole)}
        art.note(**figures)
    return figures


def _written(backend: Backend, prompts: Sequence[Prompt], config: RevisionConfig, sample: int) -> list[str]:
    found = write_answers(
        backend,
        prompts,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        sample=sample,
        seed=config.seed,
    )
    return [each.text.strip() for each in found]


def soft_label(log_odds: float, *, clamped: bool) -> float:
    """The probability that the first answer is preferred, from log p(A) - log p(B); clamped to 40–60% after a chain of thought."""
    p = 1 / (1 + math.exp(-max(-500.0, min(500.0, log_odds))))
    return min(MOST, max(LEAST, p)) if clamped else p


def prefer(
    matches: Sequence[Match],
    backend: Backend,
    principles: Principles,
    out: Path,
    *,
    chain_of_thought: bool = False,
    max_tokens: int = 200,
    seed: int = 0,
) -> dict[str, Any]:
    """Label pairs by a model's own likelihoods under principles, one drawn for each pair, and write a preference artifact whose rows
    have `probability`, the soft label of `chosen`, and `log_odds`, its log-odds before clamping. Log-odds of both orders are averaged, so
    that a liking for a letter cancels out. Where people's preferences are known, labels are measured against them.

    Args:
        chain_of_thought: the model reasons first; labels are clamped to 40–60%.
        max_tokens: of the reasoning.

    Raises UnfinishedError where the model left requests unanswered.
    """
    config = {
        "model": backend.identity,
        "principles": to_dict(principles),
        "pairs": data_sha256([asdict(match) for match in matches]),
        "chain_of_thought": chain_of_thought,
        "max_tokens": max_tokens,
    }
    drawn = [
        principles.principle[generator(seed, "principle", i).integers(len(principles.principle))]
        for i in range(len(matches))
    ]
    with (
        ArtifactWriter(out, kind="preferences", config=config, seed=seed, resumable=True) as art,
        ResponseStore(art.path / "responses.jsonl", backend.identity) as store,
    ):
        stored = StoredBackend(backend, store, "preferring")
        odds = [
            _log_odds(
                stored, matches, drawn, turned, chain_of_thought, RevisionConfig(max_tokens=max_tokens, temperature=0.0)
            )
            for turned in (False, True)
        ]
        means = [(shown - swapped) / 2 for shown, swapped in zip(*odds, strict=True)]
        rows = [_preference(*each, chain_of_thought) for each in zip(matches, drawn, means, strict=True)]
        write_rows(art.path / "preferences.jsonl", rows)
        figures: dict[str, Any] = {
            "pairs": len(rows),
            "mean_probability": sum(row["probability"] for row in rows) / len(rows),
            **_beside_people(rows, matches),
        }
        art.note(**figures)
    return figures


def _beside_people(rows: Sequence[dict[str, Any]], matches: Sequence[Match]) -> dict[str, float]:
    """How often labels are those of people, where these are known, and how well calibrated the labels are: as they came, and clamped
    to 40–60%."""
    known = [(row, m) for row, m in zip(rows, matches, strict=True) if m.human in ("first", "second")]
    if not known:
        return {}
    right = [float(row["chosen"] == m.answers[m.human == "second"]) for row, m in known]
    found = {"human_agreement": sum(right) / len(right)}
    for name, clamped in (("calibration_error", False), ("calibration_error_clamped", True)):
        labels = [soft_label(row["log_odds"], clamped=clamped) for row, _ in known]
        found[name] = calibration(labels, right)[1]
    return found


def _preference(match: Match, principle: Principle, log_odds: float, clamped: bool) -> dict[str, Any]:
    """A row of preferences, the likelier answer as the chosen one; `log_odds` are those of the chosen one before clamping."""
    better = 0 if log_odds >= 0 else 1
    return {
        "prompt": match.prompt,
        "chosen": match.answers[better],
        "rejected": match.answers[1 - better],
        "probability": soft_label(abs(log_odds), clamped=clamped),
        "log_odds": abs(log_odds),
        "principle": principle.id,
    }


def _log_odds(
    backend: Backend,
    matches: Sequence[Match],
    drawn: Sequence[Principle],
    turned: bool,
    chain_of_thought: bool,
    config: RevisionConfig,
) -> list[float]:
    """log p(A) - log p(B) of each pair, its answers in the order given or `turned`."""
    asked: list[Prompt] = []
    for match, principle in zip(matches, drawn, strict=True):
        first, second = match.answers[::-1] if turned else match.answers
        text = COMPARE.format(prompt=match.prompt, first=first, second=second, principle=principle.text)
        asked.append([{"role": "user", "content": text + (REASON if chain_of_thought else VERDICT)}])
    if chain_of_thought:
        reasons = _written(backend, asked, config, 0)
        asked = [
            [*prompt, {"role": "assistant", "content": reason or "-"}, {"role": "user", "content": VERDICT.strip()}]
            for prompt, reason in zip(asked, reasons, strict=True)
            if not isinstance(prompt, str)
        ]
    found = backend.respond([Score(context=prompt, continuation=letter) for prompt in asked for letter in LETTERS])
    if not all(isinstance(each, Scored) for each in found):
        raise UnfinishedError("some pairs have no likelihoods: the same command asks again")
    logprobs = [each.logprob for each in found if isinstance(each, Scored)]
    return [a - b for a, b in zip(logprobs[::2], logprobs[1::2], strict=True)]
