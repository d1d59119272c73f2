"""Log-probabilities of a prompt's tokens.

T tokens, E model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from luban.generate.session import TokenLogprob, token_logprobs
from luban.models.base import Model

ROWS = 256  # logits that are made at once


def scored(module: Model, hidden_TE: Tensor, following: list[int], alternatives: int) -> list[TokenLogprob]:
    """Log-probabilities of the tokens that follow each hidden state.

    Args:
        hidden_TE: of T tokens.
        following: T token ids, each the one after.
        alternatives: likeliest tokens reported with each.
    """
    found: list[TokenLogprob] = []
    for first, logits_RV in zip(range(0, len(following), ROWS), read_in_parts(module, hidden_TE), strict=True):
        found += token_logprobs(logits_RV, following[first : first + ROWS], alternatives)
    return found


def read_in_parts(module: Model, hidden_TE: Tensor) -> Iterator[Tensor]:
    """Logits (R, V) of a bounded number of hidden states at once."""
    for first in range(0, len(hidden_TE), ROWS):
        yield module.read(hidden_TE[None, first : first + ROWS]).squeeze(0)


@torch.inference_mode()
def prompt_logprobs(module: Model, prompt: list[int], alternatives: int) -> list[TokenLogprob]:
    """Of all tokens of a prompt but the first, read in one forward without a cache."""
    tokens_1T = torch.tensor([prompt], device=next(module.parameters()).device)
    return scored(module, module(tokens_1T, output="hidden")[0, :-1], prompt[1:], alternatives)
