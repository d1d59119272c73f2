"""Log-probabilities of answers with the passage summed out (Lewis et al. 2020, section 2.1).

B questions, K passages of each, T tokens of an answer.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Marginal = Literal["sequence", "token"]


def marginal(kind: Marginal, priors_BK: Tensor, logprobs_BKT: Tensor) -> Tensor:
    """(B,) log-probabilities of whole answers, in nats.

    RAG-Sequence holds one passage responsible for an answer, Σ_z p(z|x) Π_t p(y_t|x, z, y_<t); RAG-Token one for each token,
    Π_t Σ_z p(z|x) p(y_t|x, z, y_<t). With one passage they are the same.

    Args:
        priors_BK: log p(z|x); −∞ for a passage that isn't there.
        logprobs_BKT: log p(y_t|x, z, y_<t); 0 behind an answer's last token.
    """
    if kind == "sequence":
        return (priors_BK + logprobs_BKT.sum(-1)).logsumexp(1)
    return (priors_BK[:, :, None] + logprobs_BKT).logsumexp(1).sum(-1)


def responsibilities(priors_K: Tensor, logprobs_KT: Tensor) -> Tensor:
    """(K,) posterior p(z|x, y) of the passages of one question and its answer, under one passage for the whole answer."""
    return (priors_K + logprobs_KT.sum(-1)).softmax(0)
