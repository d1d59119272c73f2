"""Answers decoded with the passage summed out (Lewis et al. 2020, section 2.5).

RAG-Token is one beam search over the mixture of its passages' next-token distributions. RAG-Sequence doesn't factor into
next tokens: a beam search with each passage gives candidates, of which the likeliest over all passages is the answer.
*Thorough* decoding scores a candidate with the passages whose beam didn't hold it, too; *fast* takes those as 0.

H hypotheses, K passages, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from luban.core.errors import DataError
from luban.generate.mixture import Mixture
from luban.generate.sampling import Sampling
from luban.generate.session import Sequence as Growing
from luban.generate.session import beam_candidates
from luban.generate.source import session_for
from luban.retrieval.rag.generator import Generator
from luban.retrieval.rag.marginal import Marginal, marginal, responsibilities
from luban.serve.beam_group import grown, search_for

Decoding = Literal["thorough", "fast"]


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """An answer."""

    tokens: tuple[int, ...]
    logprob: float  # log p(y|x) in nats; of fast decoding a lower bound
    responsibilities_K: list[float]  # posterior of each passage


@torch.no_grad()
def decode(
    generator: Generator,
    kind: Marginal,
    prompts: Sequence[list[int]],
    priors_K: Tensor,
    *,
    decoding: Decoding = "thorough",
    beams: int = 4,
    max_tokens: int = 64,
) -> list[Decoded]:
    """Answers to one question, the likeliest first.

    Args:
        prompts: the question behind each passage.
        priors_K: log p(z|x).
        decoding: of RAG-Sequence.
    """
    if not prompts:
        raise DataError("an answer needs at least one passage")
    longest = min(max_tokens, *(generator.prompts.max_new_tokens(prompt) for prompt in prompts))
    priors_K = priors_K.detach()
    if kind == "token":
        searched = [search(generator, prompts, priors_K, beams, longest)]
    else:
        alone = torch.zeros(1)
        searched = [search(generator, [prompt], alone, beams, longest) for prompt in prompts]
    answers = list(dict.fromkeys(tokens for found in searched for tokens in found))
    scores_AKT = torch.stack([_scores(generator, prompts, list(answer), longest) for answer in answers]).cpu()
    if kind == "sequence" and decoding == "fast":
        for row, answer in enumerate(answers):
            for column, found in enumerate(searched):
                if answer not in found:
                    scores_AKT[row, column] = -torch.inf
    totals = marginal(kind, priors_K.cpu().expand(len(answers), -1), scores_AKT)
    order = totals.argsort(descending=True, stable=True).tolist()
    return [
        Decoded(
            tokens=answers[row],
            logprob=float(totals[row]),
            responsibilities_K=responsibilities(priors_K.cpu(), scores_AKT[row]).tolist(),
        )
        for row in order
    ]


def _scores(generator: Generator, prompts: Sequence[list[int]], answer: list[int], longest: int) -> Tensor:
    """(K, longest) log-probabilities of an answer's tokens behind each prompt, 0 behind its end."""
    found = generator.logprobs(prompts, [answer] * len(prompts))
    return torch.nn.functional.pad(found, (0, longest - found.shape[1]))


def search(
    generator: Generator, prompts: Sequence[list[int]], priors_K: Tensor, beams: int, max_tokens: int
) -> dict[tuple[int, ...], float]:
    """Beam search over the mixture of next-token distributions behind the prompts: answers with their log-probabilities, the
    likeliest first, by sums without a length penalty."""
    sampling = Sampling(beams=beams, max_tokens=max_tokens, length_penalty=0.0)
    first = Growing(prompt=prompts[0], sampling=sampling, seed=0, ends=tuple(generator.model.stop_ids))
    mixture = Mixture(session_for(generator.model.module), first, prompts, priors_K)
    found = search_for(first, max_tokens)
    while True:
        sequences = mixture.sequences
        following = beam_candidates(mixture.logits, sequences, mixture.seen, found.wanted)
        if None in following:
            raise DataError(f"the logits of {generator.model.name} are NaN or infinite: its weights are damaged")
        moves = found.advance([candidates or [] for candidates in following])
        if not moves:
            return {answer.tokens: answer.logprob for answer, _ in found.result().best}
        mixture.go_on([index for index, _ in moves], grown(sequences, moves))
