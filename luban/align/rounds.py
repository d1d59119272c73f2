"""The rounds of a run: answers, scores, advantages, and the batches that are trained on. A round that has begun is kept in
RUN/rollouts, so that a run that was interrupted inside of it goes on with the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from luban.align.advantages import adapted_coefficient, importance_weights
from luban.align.policy_config import RL, Scored
from luban.align.rollout import Answers
from luban.core.artifact import atomic_write
from luban.core.errors import ArtifactError
from luban.core.seeding import generator
from luban.data.collate.rollout import RolloutBatch
from luban.data.loader import Loader

FOLDER = "rollouts"
KEPT = 50  # rounds whose answers stay on disk
ARRAYS = ("old_logprobs", "reference_logprobs", "old_values", "sampled", "entropies", "scores")


@dataclass(frozen=True, kw_only=True)
class Round:
    """Answers, and what was computed of them before training on them."""

    answers: Answers
    arrays: dict[str, np.ndarray]  # ARRAYS: (N, T) float64, scores (N,)
    apart: dict[str, np.ndarray]  # name → (N,) scores of each reward
    rows: list[int]  # which prompt each answer is of
    beta: float  # KL coefficient
    seconds: Mapping[str, float] = field(default_factory=dict)  # that each phase of making it took

    @property
    def kl(self) -> np.ndarray:
        """(N, T) log π − log π_ref of the sampled tokens, 0 elsewhere."""
        return self.arrays["old_logprobs"] - self.arrays["reference_logprobs"]

    @property
    def mean_kl(self) -> float:
        """Mean over answers of the KL summed over tokens, in nats."""
        return float(self.kl.sum(-1).mean())

    def save(self, folder: Path, number: int) -> None:
        """Write RUN/rollouts/round_N.json, for people too, and .safetensors."""
        folder.mkdir(exist_ok=True)
        arrays = {name: np.ascontiguousarray(self.arrays[name]) for name in ARRAYS}
        arrays |= {f"reward/{name}": values for name, values in self.apart.items()}
        save_file(arrays, folder / f"round_{number:06d}.new")
        answers = self.answers
        each = zip(
            answers.prompts,
            answers.answers,
            answers.texts,
            answers.finished,
            self.arrays["scores"],
            self.kl,
            strict=True,
        )
        plain = {
            "beta": self.beta,
            "seconds": dict(self.seconds),
            "rows": self.rows,
            "answers": [
                {
                    "prompt": prompt,
                    "tokens": ids,
                    "text": text,
                    "finished": finished,
                    "score": float(score),
                    "kl": float(kl.sum()),
                    "token_kl": [round(float(x), 4) for x in kl[len(prompt) - 1 : len(prompt) - 1 + len(ids)]],
                }
                for prompt, ids, text, finished, score, kl in each
            ],
        }
        atomic_write(folder / f"round_{number:06d}.json", json.dumps(plain, ensure_ascii=False))
        (folder / f"round_{number:06d}.new").replace(folder / f"round_{number:06d}.safetensors")
        for suffix in ("json", "safetensors"):
            (folder / f"round_{number - KEPT:06d}.{suffix}").unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path, number: int) -> Round:
        """Read what `save` wrote. Raises ArtifactError where it is missing."""
        file = folder / f"round_{number:06d}.json"
        if not file.is_file() or not file.with_suffix(".safetensors").is_file():
            raise ArtifactError(f"{file} is missing, so the run can't go on inside of round {number}")
        plain: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        arrays = load_file(file.with_suffix(".safetensors"))
        each = plain["answers"]
        answers = Answers(
            [a["prompt"] for a in each],
            [a["tokens"] for a in each],
            [[] for _ in each],
            [a["text"] for a in each],
            [a["finished"] for a in each],
        )
        return cls(
            answers=answers,
            arrays={name: arrays[name] for name in ARRAYS},
            apart={n.removeprefix("reward/"): values for n, values in arrays.items() if n.startswith("reward/")},
            rows=plain["rows"],
            beta=plain["beta"],
            seconds=plain.get("seconds", {}),
        )


def next_beta(rl: RL, folder: Path, number: int) -> float:
    """The KL coefficient of a round, from those before it."""
    if not number or not rl.kl_target:
        return rl.kl
    last = Round.load(folder, number - 1)
    answers = len(last.answers.prompts)
    return adapted_coefficient(last.beta, last.mean_kl, target=rl.kl_target, horizon=rl.kl_horizon, answers=answers)


class RoundLoader:
    """Batches of rounds, in the place of a `luban.data.loader.Loader`. Batches of a round are a function of the seed and the
    round; the round is made when its first batch is asked for.

    Args:
        make: number → a new round, of the weights as they are.
        learn: called with each batch before it is given out: the critic's step.
        text: of the pretraining mix.
    """

    def __init__(
        self,
        rl: RL,
        *,
        make: Callable[[int], Round],
        folder: Path,
        batch_size: int,
        seed: int,
        pad_id: int,
        learn: Callable[[RolloutBatch, int], None] | None = None,
        text: Loader | None = None,
    ):
        self.rl, self.make, self.folder, self.learn, self.text = rl, make, folder, learn, text
        self.batch_size, self.seed, self.pad_id = batch_size, seed, pad_id
        self.steps = rl.epochs * rl.answers // batch_size  # of a round
        # a round's number, and `trained_values` of it
        self.prepared: tuple[int, dict[str, np.ndarray], dict[str, float]] = (-1, {}, {})

    def iterate(self, start_step: int = 0) -> Iterator[RolloutBatch]:
        """Batches from `start_step` on, without end."""
        step, current = start_step, None
        while True:
            number, place = divmod(step, self.steps)
            if place == 0:
                current = self.make(number)
                current.save(self.folder, number)
            elif current is None:
                current = Round.load(self.folder, number)
            batch = self.batch(current, number, place, step)
            if self.learn is not None:
                self.learn(batch, step)
            yield batch
            step += 1

    def batch(self, current: Round, number: int, place: int, step: int) -> RolloutBatch:
        """One step's batch of a round."""
        passed, at = divmod(place * self.batch_size, self.rl.answers)
        order = generator(self.seed, "round", number, "epoch", passed).permutation(self.rl.answers)
        rows = np.sort(order[at : at + self.batch_size])
        if number != self.prepared[0]:
            mask = current.answers.batch(self.pad_id).loss_mask
            self.prepared = number, *trained_values(self.rl, current, mask)
        _, values, logged = self.prepared
        batch = current.answers.batch(self.pad_id, rows)
        taken = {name: array[rows].astype(np.float32) for name, array in values.items()}
        shown = {name: np.full(len(rows), value, dtype=np.float32) for name, value in logged.items()}
        count = self.rl.divisor(taken["weights"])
        return replace(batch, values=taken, logged=shown, count=count, pretraining=self._text(step, count, len(rows)))

    def _text(self, step: int, count: float, rows: int) -> dict[str, np.ndarray]:
        """Arrays of a batch of the pretraining mix. Their mean cross-entropy has γ times the weight of the policy's loss."""
        if self.text is None:
            return {}
        batch = self.text.batch(step)
        weight = self.rl.pretrain_weight * count / max(batch.target_count, 1)
        arrays = {**batch.arrays(), "weight": np.full(rows, weight, dtype=np.float32)}
        return {f"pretrain_{name}": array for name, array in arrays.items()}


def trained_values(rl: RL, current: Round, mask: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(arrays (N, T) that are trained with, figures of the round that are logged)."""
    arrays = current.arrays
    scored = Scored(scores=arrays["scores"], mask=mask, kl=current.kl, values=arrays["old_values"], beta=current.beta)
    advantages, returns = rl.advantages(scored)
    weights = rl.token_weights(mask)
    difference = np.where(mask, arrays["old_logprobs"] - arrays["sampled"], 0.0)
    if rl.importance_cap:
        advantages = advantages * importance_weights(arrays["old_logprobs"], arrays["sampled"], rl.importance_cap)
    values = {
        "old_logprobs": arrays["old_logprobs"],
        "reference_logprobs": arrays["reference_logprobs"],
        "old_values": arrays["old_values"],
        "advantages": advantages,
        "returns": returns,
        "weights": weights,
    }
    groups = arrays["scores"].reshape(-1, rl.samples)
    figures = {
        "reward": arrays["scores"].mean(),
        "reward_std": arrays["scores"].std(),
        **({"kl": current.mean_kl, "kl_coefficient": current.beta} if rl.measures_kl else {}),
        "answer_tokens": mask.sum(-1).mean(),
        "unfinished": 1 - np.mean(current.answers.finished),
        **(engine_difference(difference, mask) if not rl.quantiles else {}),
        **{f"seconds/{phase}": seconds for phase, seconds in current.seconds.items()},
        **{f"reward_{name}": scores.mean() for name, scores in current.apart.items() if len(current.apart) > 1},
    }
    if rl.samples > 1:
        figures["groups_without_spread"] = (groups.std(1) < 1e-9).mean()
    return values, {name: float(value) for name, value in figures.items()}


def engine_difference(difference: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """How far log-probabilities of trainer and engine differ, (N, T): mean and largest over the answers' tokens. Of answers that were
    written behind another prompt than they are trained behind it would say nothing."""
    return {
        "engine_difference": np.abs(difference).sum() / max(mask.sum(), 1),
        "engine_difference_max": np.abs(difference).max(),
    }
