"""Reward models: a language model's body under a value head, trained to rank answers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from luban.align.preferences import GRADES, as_preference_shards
from luban.align.scoring import RewardModel
from luban.align.start import model_of, one_after_another, packed_beside
from luban.core.artifact import MANIFEST, read_manifest, write_json
from luban.core.errors import ConfigError, DataError
from luban.core.log import say
from luban.core.metrics.calibration import calibration
from luban.data.groups import Groups
from luban.data.shards import Shards
from luban.load.model import LoadedModel
from luban.objectives.base import Objective
from luban.objectives.ranking import Ranking
from luban.parallel.device import choose_device
from luban.parallel.world import process_rank
from luban.train.recipe import Recipe
from luban.train.run import train

SIMILAR = 0.2  # lengths that differ by less than this fraction of the longer one are alike


@dataclass(frozen=True, kw_only=True)
class RewardRecipe(Recipe):
    """A recipe of a reward model."""

    objective: Objective = field(default_factory=Ranking)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.objective, Ranking):
            raise ConfigError("luban reward trains by the objective ranking: leave objective.type out")


def reward(recipe: RewardRecipe, out: Path, name: str = "reward") -> Path:
    """Train a reward model from the body of `recipe.init` into the run `out`, or resume what is unfinished there; then measure
    it on the held-out pairs and note the figures in the manifest.

    Raises:
        UsageError: no model or no data.
        DataError: preferences that can't be used.
    """
    with packed_beside(out) as cache:
        ready, model = one_after_another(cache, lambda: packed(recipe, cache))
        path = train(ready, out, task="reward", name=name, model=model)
    if process_rank() == 0:  # the others may be here before the run is in its place
        figures = read_manifest(path).figures
        if figures.get("measured_at") != figures["step"]:
            note_quality(path, Path(ready.data.path), recipe.train.device)
    return path


def packed(recipe: RewardRecipe, cache: Path) -> tuple[RewardRecipe, LoadedModel]:
    """The recipe with its data packed in `cache`, and the model that it starts from."""
    model = model_of(recipe, "a reward model", "PAIRS.jsonl")
    path = as_preference_shards(Path(recipe.data.path), model.need_tokenizer(), cache, recipe.train.seed)
    assert isinstance(recipe.objective, Ranking)
    recipe.objective.require_data(Shards.open(path))
    return replace(recipe, data=replace(recipe.data, path=str(path))), model


def note_quality(run: Path, data: Path, device: str = "auto") -> None:
    """Measure the model of a finished run on the held-out pairs of `data`, or without any on those trained on, which is said;
    print the figures and write them into the manifest's figures."""
    try:
        shards, split = Shards.open(data, "heldout"), "heldout"
    except DataError:
        shards, split = Shards.open(data, "train"), "train"
        say("no pair is held out (fewer than 20 prompts): accuracy is measured on the pairs trained on")
    figures = quality(RewardModel.load(run, str(choose_device(device))), shards)
    for line in summary(figures, split):
        say(line)
    manifest = read_manifest(run)
    write_json(
        run / MANIFEST,
        replace(
            manifest,
            figures={**manifest.figures, **figures, "measured_on": split, "measured_at": manifest.figures["step"]},
        ).to_json(),
    )


def quality(model: RewardModel, shards: Shards) -> dict[str, Any]:
    """Figures of a reward model on the groups of a split that fit its context.

    Returns:
        accuracy over pairs (a tie counts half), accuracy of pairs of similar length and of "the longer one wins" on them and
        on all, accuracy by grade, calibration (mean predicted probability and fraction right by bin), expected calibration
        error, correlation of scores with lengths, mean and standard deviation of scores, and `score_offset`, the mean raw
        score of the best answers, which scores are shifted by.
    """
    groups = Groups.open(shards)
    texts = [shards.document(i).tolist() for i in range(shards.documents)]
    answers = np.array([int(shards.mask[shards.offsets[i] : shards.offsets[i + 1]].sum()) for i in range(len(texts))])  # type: ignore[index]
    fits = [len(text) <= model.model.spec.context for text in texts]
    scores = np.full(len(texts), np.nan)
    scores[fits] = np.array(model.scores([text for text, fit in zip(texts, fits, strict=True) if fit])) + model.offset
    better, worse, grades = _pairs(groups)
    kept = np.isfinite(scores[better]) & np.isfinite(scores[worse])
    better, worse, grades = better[kept], worse[kept], grades[kept]
    if not len(better):
        raise DataError(
            f"no {shards.split} pair of {shards.path} fits the context of {model.model.spec.context} tokens"
        )
    difference = scores[better] - scores[worse]
    longer = answers[better] - answers[worse]
    alike = np.abs(longer) < SIMILAR * np.maximum(answers[better], answers[worse])
    best = scores[groups.first[:-1]]
    figures: dict[str, Any] = {
        "accuracy": _share(difference),
        "pairs": len(better),
        "longer_wins": _share(longer),
        "accuracy_similar_length": _share(difference[alike]) if alike.any() else None,
        "pairs_similar_length": int(alike.sum()),
        "longer_wins_similar_length": _share(longer[alike]) if alike.any() else None,
        "length_correlation": _correlation(scores[fits], answers[fits]),
        "score_mean": float(np.nanmean(scores)),
        "score_std": float(np.nanstd(scores)),
        "score_offset": float(np.nanmean(best)),
        **_calibration(difference),
    }
    if graded := {GRADES[g]: _share(difference[grades == g]) for g in range(len(GRADES)) if (grades == g).any()}:
        figures["accuracy_by_grade"] = graded
    return figures


def _pairs(groups: Groups) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Documents of every better and worse answer of a group, and its grade."""
    found = [
        (i, j, int(groups.grades[g]))
        for g in range(groups.count)
        for i in range(groups.first[g], groups.first[g + 1])
        for j in range(groups.first[g], groups.first[g + 1])
        if groups.ranks[i] > groups.ranks[j]
    ]
    better, worse, grades = np.array(found, dtype=np.int64).reshape(-1, 3).T
    return better, worse, grades


def _share(difference: np.ndarray) -> float:
    """Fraction of positive differences, a zero counting half."""
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None


def _calibration(difference: np.ndarray) -> dict[str, Any]:
    """Of P = σ(|Δr|), the model's probability for the answer that it prefers: how often that is the better one, by bin."""
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    table, error = calibration(confidence, (difference > 0) + 0.5 * (difference == 0))
    return {"calibration": table, "calibration_error": error}


def summary(figures: dict[str, Any], split: str) -> list[str]:
    """Lines for people."""
    lines = [
        f"accuracy on {figures['pairs']} {split} pairs: {figures['accuracy']:.1%} (the longer answer wins "
        f"{figures['longer_wins']:.1%})"
    ]
    if figures["pairs_similar_length"]:
        lines.append(
            f"on {figures['pairs_similar_length']} whose lengths differ by less than {SIMILAR:.0%}: "
            f"{figures['accuracy_similar_length']:.1%} (the longer answer wins {figures['longer_wins_similar_length']:.1%})"
        )
    lines += [f"  {grade}: {share:.1%}" for grade, share in figures.get("accuracy_by_grade", {}).items()]
    correlation = figures["length_correlation"]
    lines.append(
        f"correlation of scores with lengths: {'none, scores or lengths are all the same' if correlation is None else format(correlation, '.2f')}"
    )
    lines.append(f"calibration: expected error {figures['calibration_error']:.3f}")
    for row in figures["calibration"]:
        bar = "█" * round(20 * row["right"])
        lines.append(f"  predicted {row['predicted']:.2f}  right {row['right']:.2f} {bar:<20} {row['pairs']} pairs")
    return lines
