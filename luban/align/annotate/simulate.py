"""Pairs labelled by a pool of simulated annotators: one of them drawn for each pair, labels flipped at random."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from luban.align.annotate.pool import Annotator, Pool
from luban.core.artifact import ArtifactWriter, write_json
from luban.core.config import to_dict
from luban.core.errors import DataError, UnfinishedError
from luban.core.hashing import data_sha256
from luban.core.jsonl import write_rows
from luban.core.metrics.agreement import agreement, cohen_kappa
from luban.core.metrics.bootstrap import interval
from luban.core.seeding import generator
from luban.evals.backends.base import Backend
from luban.evals.judges.base import SWAPPED, Judge, Judgement, Pair, Verdict
from luban.evals.judges.model import ModelJudge
from luban.evals.judges.pairs import Match
from luban.evals.requests import Scored, Written
from luban.evals.store import ResponseStore, StoredBackend

OpenJudge = Callable[[Annotator, Pool], Judge]


@dataclass(frozen=True, kw_only=True)
class Label:
    """What an annotator said of a pair."""

    match: Match
    annotator: str
    verdict: Verdict | None  # before noise, in the order of the match; None: couldn't be read
    flipped: bool  # whether noise turned it
    text: str = ""
    failed: str = ""

    @property
    def given(self) -> Verdict | None:
        """The label with its noise."""
        return SWAPPED[self.verdict] if self.verdict and self.flipped else self.verdict


def assign(pool: Pool, matches: Sequence[Match], seed: int) -> list[Annotator]:
    """The annotator of each pair, drawn by weight."""
    weights = np.array([each.weight for each in pool.annotator])
    draws = generator(seed, "annotators").choice(len(weights), len(matches), p=weights / weights.sum())
    return [pool.annotator[i] for i in draws]


def label_pairs(
    annotator: Annotator, judge: Judge, matches: Sequence[Match], *, noise: float, seed: int
) -> list[Label]:
    """One annotator's labels of pairs: the order of each drawn by seed, `noise` of the labels flipped."""
    turned = [_turned(annotator, match, seed) for match in matches]
    pairs = [
        Pair(prompt=m.prompt, first=m.answers[t], second=m.answers[1 - t], reference=m.reference)
        for m, t in zip(matches, turned, strict=True)
    ]
    found = judge.compare(pairs)
    flips = [bool(generator(seed, "noise", m.id, m.first, m.second, *m.answers).random() < noise) for m in matches]
    return [
        Label(
            match=match,
            annotator=annotator.name,
            verdict=_unturned(judgement, swapped),
            flipped=flip,
            text=judgement.text,
            failed=judgement.failed,
        )
        for match, judgement, swapped, flip in zip(matches, found, turned, flips, strict=True)
    ]


def _turned(annotator: Annotator, match: Match, seed: int) -> bool:
    if annotator.order == "drawn":
        return bool(generator(seed, "order", annotator.name, match.id, *match.answers).integers(2))
    return annotator.order == "swapped"


def _unturned(judgement: Judgement, swapped: bool) -> Verdict | None:
    return SWAPPED[judgement.verdict] if judgement.verdict and swapped else judgement.verdict


class CountedBackend(StoredBackend):
    """A stored backend that counts tokens."""

    def __init__(self, backend: Backend, store: ResponseStore, title: str):
        super().__init__(backend, store, title)
        self.tokens: Counter[str] = Counter()

    def respond(self, requests: Sequence[Any]) -> list[Any]:
        """See `Backend`."""
        found = super().respond(requests)
        for each in found:
            if isinstance(each, Written):
                self.tokens["read"] += each.prompt_tokens
                self.tokens["written"] += each.tokens
            elif isinstance(each, Scored):
                self.tokens["read"] += each.prompt_tokens + each.tokens
        return found


def annotate(
    matches: Sequence[Match],
    pool: Pool,
    open_judge: OpenJudge,
    out: Path,
    *,
    seed: int = 0,
    everyone: int = 0,
    prices: tuple[float, float] = (0.0, 0.0),
) -> dict[str, Any]:
    """Label pairs and write a preference artifact: preferences.jsonl (what `luban reward` and `luban dpo` read), labels.jsonl,
    agreement.json; returns the figures.

    Args:
        open_judge: the judge of an annotator.
        everyone: pairs, the first ones, that all annotators label as well, for the table of agreement.
        prices: for a million tokens read and written.

    Raises:
        DataError: no label could be read. UnfinishedError: some annotators didn't answer; the same command asks again.
    """
    judges = {each.name: open_judge(each, pool) for each in pool.annotator}
    config = {
        "pool": to_dict(pool),
        "judges": {name: judge.identity for name, judge in judges.items()},
        "pairs": data_sha256([asdict(match) for match in matches]),
        "everyone": everyone,
    }
    with ArtifactWriter(out, kind="preferences", config=config, seed=seed, resumable=True) as art:
        tokens = _keep_answers(judges, art.path)
        drawn = assign(pool, matches, seed)
        labels: list[Label] = []
        for each in pool.annotator:
            mine = [match for match, who in zip(matches, drawn, strict=True) if who is each]
            labels += label_pairs(each, judges[each.name], mine, noise=pool.noise, seed=seed)
        shared = matches[:everyone]
        votes = {
            each.name: label_pairs(each, judges[each.name], shared, noise=0.0, seed=seed)
            for each in pool.annotator
            if shared
        }
        place = {id(match): i for i, match in enumerate(matches)}
        labels.sort(key=lambda label: place[id(label.match)])
        kept = [label for label in labels if label.given in ("first", "second")]
        write_rows(art.path / "preferences.jsonl", [_row(label) for label in kept])
        write_rows(art.path / "labels.jsonl", [_record(label) for label in labels])
        table = agreement_table(labels, votes)
        write_json(art.path / "agreement.json", table)
        figures = _figures(labels, tokens, prices) | {
            name: value for name, value in table.items() if isinstance(value, float)
        }
        art.note(**figures)
        if failed := [label.failed for label in labels if label.failed]:
            raise UnfinishedError(
                f"{len(failed)} of {len(matches)} pairs have no label ({failed[0]}): the same command asks again"
            )
        if not kept:
            raise DataError(
                f"none of {len(matches)} labels could be used: {figures['unparsed']} couldn't be read, the rest are ties"
            )
    return figures


def _figures(labels: Sequence[Label], tokens: Sequence[CountedBackend], prices: tuple[float, float]) -> dict[str, Any]:
    """How many labels there are of each sort, and what they cost."""
    kept = [label for label in labels if label.given in ("first", "second")]
    read, written = (sum(each.tokens[name] for each in tokens) for name in ("read", "written"))
    return {
        "pairs": len(labels),
        "labelled": len(kept),
        "ties": sum(label.verdict == "tie" for label in labels),
        "unparsed": sum(label.verdict is None and not label.failed for label in labels),
        "flipped": sum(label.flipped for label in kept),
        "tokens_read": read,
        "tokens_written": written,
        "cost": (read * prices[0] + written * prices[1]) / 1e6,
    }


def _keep_answers(judges: Mapping[str, Judge], folder: Path) -> list[CountedBackend]:
    """Let models' answers be kept in one file a model, so that an interrupted run resumes."""
    counted: dict[str, CountedBackend] = {}
    for judge in judges.values():
        if isinstance(judge, ModelJudge):
            key = judge.backend.identity
            if key not in counted:
                store = ResponseStore(folder / f"responses-{key[:12]}.jsonl", key)
                counted[key] = CountedBackend(judge.backend, store, "annotating")
            judge.backend = counted[key]
    return list(counted.values())


def _row(label: Label) -> dict[str, Any]:
    better = 0 if label.given == "first" else 1
    answers = label.match.answers
    return {
        "prompt": label.match.prompt,
        "chosen": answers[better],
        "rejected": answers[1 - better],
        "annotator": label.annotator,
    }


def _record(label: Label) -> dict[str, Any]:
    return {
        "id": label.match.id,
        "annotator": label.annotator,
        "verdict": label.verdict,
        "flipped": label.flipped,
        "human": label.match.human,
        "text": label.text,
        "failed": label.failed,
    }


def agreement_table(labels: Sequence[Label], votes: Mapping[str, Sequence[Label]]) -> dict[str, Any]:
    """How far annotators agree with people and with each other, before noise.

    human_agreement: fraction of pairs with the person's label, whole and by annotator. pairwise_agreement: mean over pairs of
    annotators of the fraction of shared pairs on which they agree. variance: mean over shared pairs of the fraction of annotators
    that don't say what most say (Dubois et al. 2023, section 4.1, measure it leave-one-out).
    """
    found: dict[str, Any] = {}
    known = [label for label in labels if label.verdict and label.match.human]
    if known:
        same = [float(label.verdict == label.match.human) for label in known]
        low, high = interval(same)
        found |= {
            "human_agreement": float(np.mean(same)),
            "human_agreement_interval": [low, high],
            "human_pairs": len(same),
        }
        by_name: dict[str, list[float]] = defaultdict(list)
        for label, right in zip(known, same, strict=True):
            by_name[label.annotator].append(right)
        found["human_agreement_by_annotator"] = {
            name: {"value": float(np.mean(rights)), "n": len(rights)} for name, rights in sorted(by_name.items())
        }
        noisy = [float(label.given == label.match.human) for label in known]
        found["human_agreement_with_noise"] = float(np.mean(noisy))
    if len(votes) > 1:
        pairs = {}
        for one, other in combinations(votes, 2):
            both = [
                (a.verdict, b.verdict) for a, b in zip(votes[one], votes[other], strict=True) if a.verdict and b.verdict
            ]
            if both:
                first, second = [a for a, _ in both], [b for _, b in both]
                pairs[f"{one} {other}"] = {
                    "agreement": agreement(first, second),
                    "kappa": cohen_kappa(first, second),
                    "n": len(both),
                }
        found["pairs_of_annotators"] = pairs
        if pairs:
            found["pairwise_agreement"] = float(np.mean([each["agreement"] for each in pairs.values()]))
        columns = [[label.verdict for label in column if label.verdict] for column in zip(*votes.values(), strict=True)]
        apart = [1 - max(Counter(column).values()) / len(column) for column in columns if column]
        if apart:
            found["variance"] = float(np.mean(apart))
    return found


def pool_judge(annotator: Annotator, judge: Judge) -> Judge:
    """The judge with an annotator's own batch and temperature."""
    if isinstance(judge, ModelJudge):
        judge.template = replace(judge.template, batch=annotator.batch, temperature=annotator.temperature)
    return judge
