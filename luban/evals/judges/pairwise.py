"""Matches judged in both orders, and the figures of all of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luban.core.artifact import ArtifactWriter, write_json
from luban.core.errors import DataError, UnfinishedError
from luban.core.hashing import data_sha256
from luban.core.jsonl import write_rows
from luban.core.log import warn
from luban.core.metrics.agreement import agreement, cohen_kappa
from luban.core.metrics.ratings import Game, elo_online, rate
from luban.core.metrics.win_rate import WinRate, difficulties, length_controlled, win_rate
from luban.evals.judges.base import SWAPPED, Judge, Judgement, Pair, Verdict
from luban.evals.judges.leaderboard import leaderboard_page
from luban.evals.judges.model import TIE, ModelJudge
from luban.evals.judges.pairs import Match
from luban.evals.store import ResponseStore, StoredBackend

SCORES: dict[Verdict, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a match. `verdict` None: in at least one order it couldn't be read, or there was no answer."""

    match: Match
    verdict: Verdict | None  # of both orders together
    orders: tuple[Judgement, Judgement]  # as shown, and with the answers swapped
    again: Verdict | None = None  # the verdict of a second asking, where there was one

    @property
    def failed(self) -> str:
        """Why the judge gave no answer, if it gave none."""
        return self.orders[0].failed or self.orders[1].failed

    @property
    def consistent(self) -> bool:
        """Whether both orders prefer the same answer."""
        shown, swapped = self.orders[0].verdict, self.orders[1].verdict
        return shown is not None and swapped is not None and shown == SWAPPED[swapped]

    def row(self) -> dict[str, Any]:
        """Plain data, for judgements.jsonl."""
        match = asdict(self.match) | {"answers": list(self.match.answers)}
        orders = [{"verdict": each.verdict, "text": each.text, "failed": each.failed} for each in self.orders]
        return {**match, "verdict": self.verdict, "orders": orders, "again": self.again}


def judge_matches(judge: Judge, matches: Sequence[Match], *, again: Judge | None = None) -> list[Outcome]:
    """Judge each match in both orders: a verdict that depends on the order is a tie (Zheng et al. 2023, section 3.4). Of a judge
    that is asked for calibrated likelihoods the log-odds of both orders are averaged instead.

    Args:
        again: the judge asked a second time, which says how far it agrees with itself.
    """
    pairs = [Pair(prompt=m.prompt, first=m.answers[0], second=m.answers[1], reference=m.reference) for m in matches]
    both = [*pairs, *(pair.swapped() for pair in pairs)]
    first = judge.compare(both)
    second = again.compare(both) if again is not None else []
    count = len(matches)
    return [
        Outcome(
            match=match,
            verdict=_both(first[i], first[count + i]),
            orders=(first[i], first[count + i]),
            again=_both(second[i], second[count + i]) if second else None,
        )
        for i, match in enumerate(matches)
    ]


def _both(shown: Judgement, swapped: Judgement) -> Verdict | None:
    if shown.verdict is None or swapped.verdict is None:
        return None
    if shown.margin is not None and swapped.margin is not None:
        margin = (shown.margin - swapped.margin) / 2  # a liking for one position cancels out (Wang et al. 2023)
        return "tie" if abs(margin) < TIE else "first" if margin > 0 else "second"
    return shown.verdict if shown.verdict == SWAPPED[swapped.verdict] else "tie"


def figures(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Figures by name: value, interval, n. Win rates are the first model's of each two; unreadable judgements are counted apart."""
    found: dict[str, dict[str, Any]] = {}
    judged = [each for each in outcomes if each.verdict is not None]
    by_models: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for each in judged:
        by_models[each.match.first, each.match.second].append(each)
    hard = _difficulties(by_models)
    for (first, second), group in by_models.items():
        name = "" if len(by_models) == 1 else f"/{first} against {second}"
        scores = [SCORES[each.verdict] for each in group if each.verdict is not None]
        lengths = [[float(len(each.match.answers[k])) for each in group] for k in (0, 1)]
        known = [hard[each.match.prompt] for each in group] if hard else None
        found[f"win_rate{name}"] = _entry(win_rate(scores)) | {"model": first, "against": second}
        found[f"length_controlled_win_rate{name}"] = _entry(length_controlled(scores, lengths[0], lengths[1], known))
        found[f"ties{name}"] = _fraction([float(score == 0.5) for score in scores])
    if judged:
        found["consistent"] = _fraction([float(each.consistent) for each in judged])
        shown: list[Verdict | None] = [order.verdict for each in judged for order in each.orders]
        found["first_position"] = _fraction([SCORES[verdict] for verdict in shown if verdict is not None])
    longer = [
        each for each in judged if len(each.match.answers[0]) != len(each.match.answers[1]) and each.verdict != "tie"
    ]
    if longer:
        preferred = [
            float((len(e.match.answers[0]) > len(e.match.answers[1])) == (e.verdict == "first")) for e in longer
        ]
        found["longer_preferred"] = _fraction(preferred)
    found |= _agreements(judged)
    count = Counter("failed" if each.failed else "unparsed" for each in outcomes if each.verdict is None)
    for name in ("unparsed", "failed"):
        found[name] = {"value": count[name], "interval": None, "n": len(outcomes)}
    return found


def _difficulties(by_models: dict[tuple[str, str], list[Outcome]]) -> dict[str, float]:
    """Of each prompt, where at least three models were compared with the same one over the same prompts."""
    baselines = (
        {second for _, second in by_models} if len({s for _, s in by_models}) == 1 else {f for f, _ in by_models}
    )
    if len(by_models) < 3 or len(baselines) != 1:
        return {}
    prompts = sorted({each.match.prompt for group in by_models.values() for each in group})
    place = {prompt: i for i, prompt in enumerate(prompts)}
    turned = len({first for first, _ in by_models}) == 1
    scores = np.full((len(by_models), len(prompts)), np.nan)
    for row, group in enumerate(by_models.values()):
        for each in group:
            if each.verdict is not None:
                score = SCORES[each.verdict]
                scores[row, place[each.match.prompt]] = 1 - score if turned else score
    values = difficulties(scores) * (-1 if turned else 1)
    return dict(zip(prompts, values.tolist(), strict=True))


def _agreements(judged: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    labels = {"human": lambda each: each.match.human, "self": lambda each: each.again}
    for name, other in labels.items():
        both = [(each.verdict, other(each)) for each in judged if other(each) is not None]
        if not both:
            continue
        ours, theirs = [a for a, _ in both], [b for _, b in both]
        found[f"{name}_agreement"] = _fraction([float(a == b) for a, b in both])
        found[f"{name}_kappa"] = {"value": cohen_kappa(ours, theirs), "interval": None, "n": len(both)}
        decided = [(a, b) for a, b in both if "tie" not in (a, b)]
        if decided:
            without = agreement([a for a, _ in decided], [b for _, b in decided])
            found[f"{name}_agreement_without_ties"] = {"value": without, "interval": None, "n": len(decided)}
    return found


def _entry(rate: WinRate) -> dict[str, Any]:
    return {"value": rate.value, "interval": list(rate.interval), "n": rate.n}


def _fraction(scores: Sequence[float]) -> dict[str, Any]:
    return _entry(win_rate(scores))


def games_of(outcomes: Sequence[Outcome]) -> list[Game]:
    """Judged matches as games."""
    return [Game(o.match.first, o.match.second, SCORES[o.verdict]) for o in outcomes if o.verdict is not None]


def kept_answers(judge: Judge | None, path: Path) -> AbstractContextManager[object]:
    """Let a model's answers be kept in a file, so that an interrupted run resumes."""
    if not isinstance(judge, ModelJudge):
        return nullcontext()
    store = ResponseStore(path, judge.backend.identity)
    judge.backend = StoredBackend(judge.backend, store, "judging")
    return store


def run_judge(
    judge: Judge, matches: Sequence[Match], out: Path, *, again: Judge | None = None
) -> dict[str, dict[str, Any]]:
    """Judge matches and write results.json, judgements.jsonl, leaderboard.html; returns the figures.

    Raises:
        UnfinishedError: the judge could not be asked about some matches; the same command asks again.
        DataError: no judgement at all could be read.
    """
    config = {
        "judge": judge.identity,
        "matches": data_sha256([asdict(match) for match in matches]),
        "again": bool(again),
    }
    settings = {"judge": judge.name}
    with (
        ArtifactWriter(out, kind="judgement", config=config, settings=settings, resumable=True) as art,
        kept_answers(judge, art.path / "responses.jsonl"),
        kept_answers(again, art.path / "responses-again.jsonl"),
    ):
        outcomes = judge_matches(judge, matches, again=again)
        found = figures(outcomes)
        write_rows(art.path / "judgements.jsonl", [each.row() for each in outcomes])
        games = games_of(outcomes)
        if games:
            ratings = rate(games)
            online = elo_online(games)
            for each in ratings:
                found[f"rating/{each.player}"] = {
                    "value": each.rating,
                    "interval": list(each.interval) if each.interval else None,
                    "n": each.games,
                }
                found[f"online_elo/{each.player}"] = {"value": online[each.player], "interval": None, "n": each.games}
            if outside := [each.player for each in ratings if each.interval is None]:
                more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
                warn(
                    f"{', '.join(outside[:3])}{more} won or lost all that compares them with the others: such ratings say on which side of "
                    "the others a model stands, and have no interval"
                )
            page = leaderboard_page(ratings, online, found, judge.name, outcomes)
            (art.path / "leaderboard.html").write_text(page, encoding="utf-8")
        write_json(art.path / "results.json", found)
        art.note(**{name: entry["value"] for name, entry in found.items()})
        if failed := [each.failed for each in outcomes if each.failed]:
            raise UnfinishedError(
                f"{len(failed)} of {len(outcomes)} matches have no judgement ({failed[0]}): the same command asks again"
            )
        if not games:
            raise DataError(
                f"none of {len(outcomes)} judgements of {judge.name} could be read: give another --template"
            )
    return found
