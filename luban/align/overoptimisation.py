"""Reward over-optimisation (Gao et al. 2023): gold reward against distance from the initial policy, fitted by their forms.

d is the square root of the KL divergence from the initial policy, in nats. Best-of-n: R(d) = d (α - β d). Reinforcement
learning: R(d) = d (α - β ln d).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike

from luban.core.artifact import atomic_write
from luban.core.errors import DataError
from luban.core.jsonl import read_rows
from luban.core.page import render_page
from luban.report.chart import Chart, Series, draw

Form = Literal["best_of_n", "reinforcement"]
SMALLEST_RL = 0.3  # d below which the form of reinforcement learning doesn't hold: its slope at 0 is infinite

_SECOND: dict[Form, Callable[[np.ndarray], np.ndarray]] = {
    "best_of_n": lambda d: -d * d,
    "reinforcement": lambda d: -d * np.log(d),
}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A curve of gold reward."""

    form: Form
    alpha: float
    beta: float
    r_squared: float
    farthest: float = math.inf  # the largest distance of the points

    def reward(self, d: float) -> float:
        """The gold reward at a distance, less that of the initial policy."""
        return float(self.alpha * d + self.beta * _SECOND[self.form](np.array(d)))

    @property
    def peak(self) -> float:
        """The distance at which the gold reward is highest; infinite where it never falls."""
        if self.beta <= 0:
            return math.inf
        return self.alpha / (2 * self.beta) if self.form == "best_of_n" else math.exp(self.alpha / self.beta - 1)

    @property
    def peak_words(self) -> str:
        """Where the curve is highest, if that is among the points: a form says nothing behind them."""
        if self.peak <= self.farthest:
            return f"peak at √KL = {self.peak:.2f}"
        return f"no peak up to √KL = {self.farthest:.2f}, the farthest point"


def fit_overoptimisation(form: Form, kl: ArrayLike, gold: ArrayLike) -> Fit:
    """α and β by least squares; both forms are linear in them.

    Args:
        kl: divergence from the initial policy in nats, at each point of a curve.
        gold: mean gold reward there, less that of the initial policy.

    Raises DataError for fewer than three points that the form holds for.
    """
    d = np.sqrt(np.asarray(kl, dtype=np.float64))
    rewards = np.asarray(gold, dtype=np.float64)
    kept = d >= SMALLEST_RL if form == "reinforcement" else d > 0
    d, rewards = d[kept], rewards[kept]
    if len(d) < 3:
        least = f" with √KL of at least {SMALLEST_RL}" if form == "reinforcement" else ""
        raise DataError(f"a curve needs at least three points{least}, {len(d)} given")
    columns = np.stack([d, _SECOND[form](d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, rewards, rcond=None)
    left = rewards - columns @ [alpha, beta]
    spread = float(((rewards - rewards.mean()) ** 2).sum())
    r_squared = 1 - float((left**2).sum()) / spread if spread else 1.0
    return Fit(form=form, alpha=float(alpha), beta=float(beta), r_squared=r_squared, farthest=float(d.max()))


def best_of_n_curve(proxy: np.ndarray, gold: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """(len(sizes),) mean gold reward of the answer with the highest proxy reward of n, unbiased, from N ≥ n answers a prompt: the
    mean over all subsets (Nakano et al. 2021, appendix I).

    Args:
        proxy, gold: (prompts, N) rewards of the same answers.

    Raises DataError where a size is larger than N.
    """
    total = proxy.shape[1]
    if max(sizes) > total or min(sizes) < 1:
        raise DataError(f"best of {max(sizes)} can't be estimated from {total} answers a prompt")
    ordered = np.take_along_axis(gold, np.argsort(proxy, axis=1, kind="stable"), 1)  # by rising proxy reward
    logs = np.array([math.lgamma(i + 1) for i in range(total + 1)])

    def choose(top: np.ndarray, n: int) -> np.ndarray:
        """log of the binomial coefficient, -inf where top < n."""
        rows = np.full(len(top), -np.inf)
        kept = top >= n
        rows[kept] = logs[top[kept]] - logs[n] - logs[top[kept] - n]
        return rows

    places = np.arange(total)
    found = []
    for n in sizes:
        weights = np.exp(choose(places, n - 1) - choose(np.array([total]), n))
        found.append(float((ordered @ weights).mean()))
    return np.array(found)


def optimal_policy_curve(
    proxy: np.ndarray, gold: np.ndarray, strengths: Iterable[float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(KL, proxy reward, gold reward) of the policies that reinforcement learning with a KL penalty tends to: the initial policy's
    answers reweighted by exp(proxy × strength), strength = 1/β (Korbak et al. 2022).

    Args:
        proxy, gold: (prompts, N) rewards of answers drawn from the initial policy.
        strengths: 1/β, each gives a point.
    """
    points = []
    for strength in strengths:
        logits = proxy * strength
        logits = logits - logits.max(1, keepdims=True)
        weights = np.exp(logits)
        weights /= weights.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            divergence = np.where(weights > 0, weights * np.log(weights * proxy.shape[1]), 0.0).sum(1)
        points.append((divergence.mean(), (weights * proxy).sum(1).mean(), (weights * gold).sum(1).mean()))
    kl, of_proxy, of_gold = np.array(points).T
    return kl, of_proxy, of_gold


def read_rewards(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(prompts, N) proxy and gold rewards of a .jsonl file: `prompt`, `proxy`, `gold`, a row an answer. Prompts with more answers
    than the fewest lose their last ones.

    Raises DataError for a row without these, and where no prompt has two answers.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for number, row in read_rows(file):
        values = (row.get("proxy"), row.get("gold"))
        if "prompt" not in row or not all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
        ):
            raise DataError(f"{file}:{number}: a row needs prompt and the numbers proxy and gold")
        found.setdefault(str(row["prompt"]), []).append(values)  # type: ignore[arg-type]
    fewest = min(map(len, found.values()), default=0)
    if fewest < 2:
        raise DataError(f"{file}: every prompt needs at least two answers with both rewards")
    table = np.array([rows[:fewest] for rows in found.values()], dtype=np.float64)
    return table[:, :, 0], table[:, :, 1]


def overoptimisation_report(file: Path, out: Path) -> dict[str, Fit]:
    """Fit both curves of a file's rewards and write a page of them; returns the fits.

    Best-of-n up to the number of answers a prompt; reinforcement as the policies that a KL penalty tends to, as far as those
    answers can tell (KL up to two thirds of the logarithm of their number).
    """
    proxy, gold = read_rewards(file)
    total, start = proxy.shape[1], float(gold.mean())
    sizes = sorted({round(n) for n in np.geomspace(1, total, 24)})
    kl = np.array([math.log(n) - (n - 1) / n for n in sizes])
    of_n = best_of_n_curve(proxy, gold, sizes) - start
    scale = float(proxy.std()) or 1.0
    kl_rl, _, of_rl = optimal_policy_curve(proxy, gold, np.geomspace(0.1, 30, 40) / scale)
    kept = kl_rl < 2 / 3 * math.log(total)
    fits = {
        "best_of_n": fit_overoptimisation("best_of_n", kl, of_n),
        "reinforcement": fit_overoptimisation("reinforcement", kl_rl[kept], of_rl[kept] - start),
    }
    curves = {"best_of_n": (kl, of_n), "reinforcement": (kl_rl[kept], of_rl[kept] - start)}
    sections = [
        {"title": name.replace("_", " "), "svg": Markup(_drawn(fits[name], *curves[name])), "fit": fits[name]}
        for name in fits
    ]
    lead = f"{proxy.shape[0]} prompts, {total} answers each: gold reward above the initial policy's, as the proxy is optimised."
    atomic_write(out, render_page("Reward over-optimisation", lead, BODY, sections=sections))
    return fits


def _drawn(fit: Fit, kl: np.ndarray, gold: np.ndarray) -> str:
    d = np.sqrt(kl)
    fitted = [(float(x), fit.reward(float(x))) for x in np.linspace(max(d.min(), 0.05), d.max(), 80)]
    series = [
        Series("measured", list(zip(d.tolist(), gold.tolist(), strict=True)), "a", dots=True),
        Series("fitted", fitted, "b"),
    ]
    return draw(Chart(f"gold reward, {fit.form}", "√KL", "gold reward", series))


BODY = """
{% for s in sections %}<h2>{{ s.title }}</h2><p class="soft">α = {{ "%.4f"|format(s.fit.alpha) }}, β = {{ "%.4f"|format(s.fit.beta) }}, R² = {{ "%.4f"|format(s.fit.r_squared) }}, {{ s.fit.peak_words }}</p>
<div class="card"><style>.curve { fill: none; stroke-width: 2; } .curve.a { stroke: var(--a); } .curve.b { stroke: var(--b); } .dot.a { fill: var(--a); } .grid { stroke: var(--line); } .axis { stroke: var(--soft); }</style>{{ s.svg }}</div>{% endfor %}
"""
