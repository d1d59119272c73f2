"""Ratings of players from games: Bradley–Terry by maximum likelihood, and Elo's running update beside it.

P players, B sets of games (bootstrap resamples). A rating difference of 400 points means odds of 10 to 1 (Elo 1978).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from luban.core.errors import DataError
from luban.core.seeding import generator

START = 1000.0  # rating of a new player; of all players together on average
SCALE = 400 / np.log(10)  # rating points for each unit of log-odds
PRIOR = 1e-6  # weight of a draw of each player against an average one, so that an unbeaten player's rating is finite
STEPS, CLOSE = 100, 1e-9  # of Newton's method: at most, and the step at which it ends


@dataclass(frozen=True)
class Game:
    """One comparison."""

    first: str
    second: str
    score: float  # of the first: 1 won, 0.5 tie, 0 lost


def expected_score(rating: float, other: float) -> float:
    """The probability that a player of `rating` beats one of `other`, 1 ÷ (1 + 10^((other - rating)/400))."""
    return float(1 / (1 + 10 ** ((other - rating) / 400)))


def elo_online(games: Iterable[Game], k: float = 4.0) -> dict[str, float]:
    """Ratings after one pass over the games in their order, each moved by `k` times the surprise (4 in Chatbot Arena, 32 in
    chess). Other orders of the same games give other ratings."""
    ratings: dict[str, float] = {}
    for game in games:
        first, second = ratings.setdefault(game.first, START), ratings.setdefault(game.second, START)
        gain = k * (game.score - expected_score(first, second))
        ratings[game.first], ratings[game.second] = first + gain, second - gain
    return ratings


def bradley_terry(wins_BPP: np.ndarray) -> np.ndarray:
    """(B, P) ratings that make the games likeliest (Bradley and Terry 1952), their mean 1000; ties count as half a win each.

    Args:
        wins_BPP: how often player i beat player j; of one set of games (P, P), which gives (P,).

    Raises DataError where two groups of players never met: their ratings can't be compared.
    """
    if wins_BPP.ndim == 2:
        return bradley_terry(wins_BPP[None])[0]
    players = wins_BPP.shape[-1]
    games_BPP = wins_BPP + np.swapaxes(wins_BPP, 1, 2)
    _require_connected(games_BPP.sum(0))
    strength_BP = np.zeros(wins_BPP.shape[:2])
    for _ in range(STEPS):
        chance_BPP = 1 / (1 + np.exp(strength_BP[:, None, :] - strength_BP[:, :, None]))  # i beats j
        gradient_BP = (wins_BPP - games_BPP * chance_BPP).sum(2) - PRIOR * strength_BP
        weight_BPP = games_BPP * chance_BPP * (1 - chance_BPP)
        hessian_BPP = -weight_BPP
        places = np.arange(players)
        hessian_BPP[:, places, places] = weight_BPP.sum(2) - weight_BPP[:, places, places] + PRIOR
        step_BP = np.linalg.solve(hessian_BPP, gradient_BP[..., None])[..., 0]
        step_BP *= np.minimum(1, 2 / np.maximum(np.abs(step_BP).max(1, keepdims=True), 1e-12))  # far steps overshoot
        strength_BP += step_BP
        if np.abs(step_BP).max() < CLOSE:
            break
    return START + SCALE * (strength_BP - strength_BP.mean(1, keepdims=True))


def _require_connected(games_PP: np.ndarray) -> None:
    reached = {0}
    frontier = [0]
    while frontier:
        near = set(np.flatnonzero(games_PP[frontier.pop()]).tolist()) - reached
        reached |= near
        frontier += near
    if len(reached) < len(games_PP):
        raise DataError(
            "some players never met the others, directly or through third ones: their ratings can't be compared"
        )


@dataclass(frozen=True, kw_only=True)
class Rating:
    """A player's rating."""

    player: str
    rating: float
    interval: tuple[float, float] | None  # bootstrap over games, 95%; None where the likelihood has no maximum
    games: int
    score: float  # mean of wins and half the ties


def rate(games: Sequence[Game], *, resamples: int = 1000, level: float = 0.95) -> list[Rating]:
    """Bradley–Terry ratings of all players with bootstrap intervals, best first; the order of games changes nothing.

    Games are resampled within each two players, who therefore meet as often in every resample. The likelihood has a maximum only among
    players of whom each has, directly or through others, won and lost against each other (Ford 1957; a tie is half of both). Of the largest
    such group the mean is 1000. A player outside of it, such as one that won every game, has a rating that says on which side of the
    group it stands and nothing more, and no interval.

    Raises DataError for no games, and as `bradley_terry` does.
    """
    if not games:
        raise DataError("ratings need at least one game")
    players = sorted({name for game in games for name in (game.first, game.second)})
    wins_BPP = _resampled(games, players, resamples)
    inside = _comparable(wins_BPP[0])
    ratings = bradley_terry(wins_BPP)
    if inside.any():
        ratings += START - ratings[:, inside].mean(1, keepdims=True)
    low, high = np.quantile(ratings[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
    total = wins_BPP[0] + wins_BPP[0].T
    found = [
        Rating(
            player=name,
            rating=float(ratings[0, i]),
            interval=(float(low[i]), float(high[i])) if inside[i] else None,
            games=round(total[i].sum()),
            score=float(wins_BPP[0, i].sum() / total[i].sum()),
        )
        for i, name in enumerate(players)
    ]
    return sorted(found, key=lambda each: (-each.rating, each.player))


def _resampled(games: Sequence[Game], players: Sequence[str], resamples: int) -> np.ndarray:
    """(1 + resamples, P, P) wins of the games, then of games drawn with replacement, of each two players as many as they played."""
    place = {name: i for i, name in enumerate(players)}
    results: dict[tuple[int, int], Counter[float]] = defaultdict(Counter)
    for game in games:
        i, j = place[game.first], place[game.second]
        results[min(i, j), max(i, j)][game.score if i < j else 1 - game.score] += 1
    rng = generator(0, "ratings")
    wins_BPP = np.zeros((resamples + 1, len(players), len(players)))
    for (i, j), counts in sorted(results.items()):
        scores = sorted(counts)
        played = np.array([counts[score] for score in scores])
        drawn = rng.multinomial(played.sum(), played / played.sum(), resamples)
        won = np.concatenate([played[None], drawn]) @ np.array(scores)
        wins_BPP[:, i, j] = won
        wins_BPP[:, j, i] = played.sum() - won
    return wins_BPP


def _comparable(wins_PP: np.ndarray) -> np.ndarray:
    """(P,) bool: the players of the largest group of which each has a chain of wins to each other; of none where that is one player."""
    reached = (wins_PP > 0) | np.eye(len(wins_PP), dtype=bool)
    for _ in range(max(1, int(np.ceil(np.log2(len(wins_PP)))))):
        reached = (reached.astype(float) @ reached) > 0
    groups = reached & reached.T
    largest = groups[groups.sum(1).argmax()]
    return largest if largest.sum() > 1 else np.zeros(len(wins_PP), dtype=bool)
