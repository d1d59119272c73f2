"""Best-of-n: several answers to a prompt, the one that a reward likes best. At decoding, and as data for fine-tuning
(rejection sampling; with rounds of it, expert iteration)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from luban.align.preferences import Text, as_messages
from luban.align.prompts import prompt_ids, prompt_of
from luban.align.rewards.base import Answer, Rewards
from luban.align.rollout import Sampler
from luban.core.errors import DataError
from luban.core.jsonl import write_rows
from luban.core.log import progress
from luban.core.seeding import derive
from luban.generate.sampling import Sampling
from luban.load.model import LoadedModel
from luban.serve.engine import Engine
from luban.serve.request import Choice

TOGETHER = 512  # answers that are written at once, more where one prompt has more


def best_of(
    engine: Engine, model: LoadedModel, row: dict[str, Any], sampling: Sampling, rewards: Rewards
) -> tuple[Choice, list[float]]:
    """(the answer with the highest score of `sampling.n`, the first of equals; all scores) to a row's prompt."""
    ids = prompt_ids(prompt_of(row), model.need_tokenizer())
    choices = engine.generate(ids, sampling)[0].choices
    answers = [Answer(row=row, text=c.text, prompt_ids=ids, ids=list(c.token_ids)) for c in choices]
    scores = rewards.scores(answers)[0].tolist()
    return choices[int(np.argmax(scores))], scores


def rejection_sample(
    model: LoadedModel,
    rows: Sequence[dict[str, Any]],
    rewards: Rewards,
    out: Path,
    sampling: Sampling,
    *,
    least: float = -math.inf,
    pairs: bool = False,
) -> dict[str, float]:
    """Write the best of `sampling.n` answers to each prompt as conversations that `luban sft` takes (Touvron et al. 2023b, section
    3.2.3; Bai et al. 2022; AlpacaFarm's expert iteration), or with the worst as pairs for `luban dpo`: labels of fresh answers.

    Args:
        rows: of a file of prompts.
        least: prompts whose best answer scores below this are left out.
        pairs: prompt, chosen and rejected; prompts whose answers all score the same are left out.

    Returns:
        Figures: prompts kept, mean score of all answers and of the best ones.

    Raises:
        DataError: no prompt is kept.
    """
    lines, every, best = list[dict[str, Any]](), list[float](), list[float]()
    n = sampling.n
    together = max(1, TOGETHER // n)
    prompts = [prompt_ids(prompt_of(row), model.need_tokenizer()) for row in rows]
    longest = min(model.spec.context, max(map(len, prompts), default=0) + sampling.max_tokens)
    sampler = Sampler(model, model.module, min(together, len(rows)) * n, longest)
    with progress("sampling", total=len(rows), unit="prompts") as bar:
        for start in range(0, len(rows), together):
            taken, ids = rows[start : start + together], prompts[start : start + together]
            seed = None if sampling.seed is None else derive(sampling.seed, "rows", start)
            written = sampler.write(ids, replace(sampling, seed=seed))
            scores = rewards.scores(
                [
                    Answer(row=taken[at // n], text=text, prompt_ids=ids[at // n], ids=tokens)
                    for at, (text, tokens) in enumerate(zip(written.texts, written.answers, strict=True))
                ]
            )[0].reshape(-1, n)
            every += scores.ravel().tolist()
            for at, (row, of_row) in enumerate(zip(taken, scores, strict=True)):
                score, worst = float(of_row.max()), float(of_row.min())
                if score < least or (pairs and score == worst):
                    continue
                best.append(score)
                texts = [written.texts[at * n + int(i)] for i in (of_row.argmax(), of_row.argmin())]
                lines.append(_line(prompt_of(row), texts, score, pairs))
            bar.advance(len(taken))
    if not lines:
        raise DataError(f"no answer to {len(rows)} prompts scores {least:g} or more: lower the threshold or raise n")
    write_rows(out, lines)
    return {"prompts": len(lines), "mean_score": float(np.mean(every)), "best_score": float(np.mean(best))}


def _line(prompt: Text, texts: list[str], score: float, pairs: bool) -> dict[str, Any]:
    if pairs:
        return {"prompt": prompt, "chosen": texts[0], "rejected": texts[1]}
    return {"messages": [*as_messages(prompt, "user"), {"role": "assistant", "content": texts[0]}], "score": score}


def best_of_n_kl(n: int) -> float:
    """Upper bound on the KL divergence of best-of-n from the model, log n − (n − 1) / n nats (Stiennon et al. 2020; exact for
    scores without ties)."""
    return math.log(n) - (n - 1) / n


def expected_best(scores: Sequence[float], n: int) -> float:
    """Unbiased estimate of the mean best score of `n` answers from N ≥ n of them: the mean over all subsets of their maximum
    (Nakano et al. 2021, appendix I). ValueError for fewer."""
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} can't be estimated from {total} scores")
    ordered = sorted(scores)
    weights = [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)]
    return sum(w * s for w, s in zip(weights, ordered, strict=True))
