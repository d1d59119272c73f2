"""Random texts of a structure: a walk over the tokens that it allows."""

from __future__ import annotations

import random

import torch

from luban.generate.token_mask import Matcher


def walk(compiler, structure, tokenizer, rng: random.Random, most: int = 600, hurry: int = 120) -> str | None:
    """A text of the structure, None where it has not ended after `most` tokens; after `hurry` tokens the shortest ways on
    are preferred."""
    matcher, ids, bits = compiler.matcher(structure), [], torch.arange(32)
    words = torch.zeros(1, matcher.words, dtype=torch.int32)
    for step in range(most):
        Matcher.write_masks([matcher], words)
        allowed = (words[0, :, None] >> bits & 1).flatten().nonzero().flatten().tolist()
        ends = [token for token in allowed if token in tokenizer.stop_ids]
        if matcher.finished or (ends and (step > hurry or rng.random() < 0.3)):
            return tokenizer.decode(ids)
        allowed = [token for token in allowed if token not in tokenizer.stop_ids]
        close = [token for token in allowed if tokenizer.token_bytes(token) in (b"'", b")")]
        token = rng.choice(close if close and (step > hurry or rng.random() < 0.3) else allowed)
        assert matcher.consume(token)
        ids.append(token)
    return None
