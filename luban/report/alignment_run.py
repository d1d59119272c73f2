"""What a report shows of reward models, preference losses and reinforcement learning: curves, calibration, and answers with each
token's divergence from the reference in colour."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from luban.report.chart import Chart, Series, smooth
from luban.tokenizer.tokenizer import Tokenizer, load_tokenizer

WIDTH, HEIGHT = 400, 230  # of a chart that shares its row with others
TONES = "abcd"
SHOWN = 16  # answers of the last round: half of them the best, half the worst
LEAST_SCALE = 0.1  # nats that are drawn in full colour, where no token diverges more

Rows = Sequence[Mapping[str, Any]]


class Curves(NamedTuple):
    """A chart of some columns of metrics.jsonl."""

    title: str
    unit: str
    columns: Mapping[str, str]  # column → name in the legend


CURVES = (
    Curves("KL of an answer from the reference", "nats", {"kl": "KL"}),
    Curves("entropy of a token", "nats", {"entropy": "entropy"}),
    Curves(
        "ratio to the policy that sampled", "ratio", {"ratio_min": "smallest", "ratio": "mean", "ratio_max": "largest"}
    ),
    Curves("share of tokens whose ratio is clipped", "share", {"clipped_share": "clipped"}),
    Curves("tokens of an answer", "tokens", {"answer_tokens": "tokens"}),
    Curves(
        "answers cut off; groups whose scores are all equal",
        "share",
        {"unfinished": "cut off", "groups_without_spread": "groups without spread"},
    ),
    Curves(
        "log-probabilities, engine against trainer",
        "nats",
        {"engine_difference": "mean difference", "engine_difference_max": "largest"},
    ),
    Curves(
        "seconds of a round before its updates",
        "seconds",
        {
            "seconds/sampling": "sampling",
            "seconds/scoring": "scoring",
            "seconds/reading": "policy, reference, critic",
        },
    ),
    Curves("pairs told apart", "share", {"accuracy": "training", "heldout_accuracy": "held out"}),
    Curves(
        "margin of implicit rewards, or of scores",
        "margin",
        {"reward_margin": "training", "heldout_reward_margin": "held out"},
    ),
    Curves(
        "log-probability of a token of the chosen answer",
        "nats",
        {"chosen_logprob": "training", "heldout_chosen_logprob": "held out"},
    ),
)
KNOWN = {"reward", "reward_std", "reward_margin"}


def alignment_charts(rows: Rows, figures: Mapping[str, Any]) -> list[Chart]:
    """Small charts of a run's metrics, and the calibration of a reward model; empty for other runs."""
    apart = {name: name.removeprefix("reward_") for row in rows for name in row if name.startswith("reward_")}
    apart = {column: name for column, name in apart.items() if column not in KNOWN}
    every = (*CURVES, Curves("each reward", "reward", apart))
    charts = [_curves(each, rows) for each in every if any(c in row for row in rows for c in each.columns)]
    return [*charts, *_calibration(figures)]


def reward_chart(name: str, rows: Rows) -> Chart | None:
    """The main chart of reinforcement learning: rewards of training and of held-out prompts; None for other runs."""
    reward = _column(rows, "reward")
    if not reward:
        return None
    series = [
        Series("each step", reward, "a", faint=True),
        Series("training, smoothed", smooth(reward, max(10, reward[-1][0] / 50)), "a"),
        Series("held out", _column(rows, "heldout_reward"), "b", dots=True),
    ]
    return Chart(f"{name}: reward", "step", "mean reward of an answer", series)


def _column(rows: Rows, name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), (int, float))]


def _curves(curves: Curves, rows: Rows) -> Chart:
    series = [
        Series(name, _column(rows, column), TONES[i % len(TONES)])
        for i, (column, name) in enumerate(curves.columns.items())
    ]
    return Chart(curves.title, "step", curves.unit, [s for s in series if s.points], width=WIDTH, height=HEIGHT)


def _calibration(figures: Mapping[str, Any]) -> list[Chart]:
    """How often the answer that a reward model prefers is the better one, by its probability."""
    bins = figures.get("calibration")
    if not isinstance(bins, list) or not bins:
        return []
    found = [(row["predicted"], row["right"]) for row in bins]
    line = [(0.5, 0.5), (1.0, 1.0)]
    return [
        Chart(
            "calibration on held-out pairs",
            "predicted probability",
            "share that is right",
            [Series("measured", found, "a", dots=True), Series("perfect", line, "c", faint=True)],
            top=1.0,
            width=WIDTH,
            height=HEIGHT,
        )
    ]


def reward_model_rows(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what, value) of a reward model's figures; empty for other runs."""
    if "longer_wins" not in figures:
        return []
    split, similar = figures.get("measured_on", "heldout"), figures["pairs_similar_length"]
    rows = [
        (f"accuracy on {figures['pairs']:,} {split} pairs", f"{figures['accuracy']:.1%}"),
        ("… of “the longer answer wins”", f"{figures['longer_wins']:.1%}"),
    ]
    if similar:
        rows += [
            (f"accuracy on {similar:,} of similar length", f"{figures['accuracy_similar_length']:.1%}"),
            ("… of “the longer answer wins”", f"{figures['longer_wins_similar_length']:.1%}"),
        ]
    rows += [(grade, f"{share:.1%}") for grade, share in figures.get("accuracy_by_grade", {}).items()]
    if figures["length_correlation"] is not None:
        rows.append(("correlation of scores with lengths", f"{figures['length_correlation']:.2f}"))
    return [*rows, ("expected calibration error", f"{figures['calibration_error']:.3f}")]


def rollouts_of(run: Path) -> dict[str, Any] | None:
    """Answers of the newest round that a run of reinforcement learning has kept, the best and the worst; None for other runs."""
    rounds = sorted((run / "rollouts").glob("round_*.json"))
    if not rounds or not (run / "tokenizer").is_dir():
        return None
    answers = json.loads(rounds[-1].read_text(encoding="utf-8"))["answers"]
    ranked = sorted(answers, key=lambda answer: -answer["score"])
    shown = ranked if len(ranked) <= SHOWN else [*ranked[: SHOWN // 2], *ranked[-SHOWN // 2 :]]
    tokenizer = load_tokenizer(run / "tokenizer")
    scale = max(LEAST_SCALE, *(abs(kl) for answer in shown for kl in answer.get("token_kl", ())))
    return {
        "round": int(rounds[-1].stem.partition("_")[2]),
        "shown": len(shown),
        "answers": len(answers),
        "scale": scale,
        "rows": [_answer(answer, tokenizer, scale) for answer in shown],
    }


def _answer(answer: Mapping[str, Any], tokenizer: Tokenizer, scale: float) -> dict[str, Any]:
    ids = answer["tokens"]
    divergences = answer.get("token_kl") or [0.0] * len(ids)
    return {
        "prompt": tokenizer.decode(answer["prompt"]),
        "score": f"{answer['score']:.3f}",
        "kl": f"{answer['kl']:.3f}",
        "finished": answer["finished"],
        "tokens": [
            {
                "text": tokenizer.decode([token], skip_special=False),
                "kl": f"{round(kl, 3) + 0.0:+.3f}",
                "style": tint(kl, scale),
            }
            for token, kl in zip(ids, divergences, strict=True)
        ],
    }


def tint(kl: float, scale: float) -> str:
    """The background of a token: orange where the policy gives it a higher probability than the reference, blue where a lower."""
    share = round(100 * min(abs(kl) / scale, 1.0))
    return f"background:color-mix(in srgb, var(--{'b' if kl > 0 else 'a'}) {share}%, transparent)" if share else ""
