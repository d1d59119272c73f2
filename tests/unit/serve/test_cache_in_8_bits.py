"""Keys and values in 8 bits: half the memory and a little loss, the same for a token whatever happens to its sequence."""

from __future__ import annotations

import random

import pytest
import torch

from luban import Engine, Sampling, load_model
from luban.core.errors import UnsupportedError
from luban.nn.float8 import E4M3
from luban.serve.backend import PagedBackend
from luban.serve.memory import slot_bytes
from luban.serve.paged import PagedBatch


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint)


@pytest.mark.parametrize("swap", [0, 2**20], ids=["read again", "swapped"])
@pytest.mark.parametrize("invariant", [False, True], ids=["", "batch invariant"])
def test_requests_get_what_they_get_alone(tiny_checkpoint, swap, invariant):
    """In chunks, beside others, with common beginnings, and pushed out of memory meanwhile."""
    model, rng = load_model(tiny_checkpoint), random.SystemRandom()
    common = "".join(rng.choice("abcdef ") for _ in range(30))
    texts = [rng.choice([common, common[:17]]) + rng.choice("xyz") * rng.randrange(1, 20) for _ in range(10)]
    sampling = Sampling(max_tokens=15, temperature=0, ignore_eos=True)
    alone = Engine(model, cache_dtype="fp8", max_batch=1, batch_invariant=invariant)
    expected = [alone.generate([text], sampling)[0].token_ids for text in texts]
    engine = Engine(model)
    blocks = 26
    engine.batch = batch = PagedBatch(
        model.module,
        cache_dtype="fp8",
        max_batch=6,
        max_tokens=14,
        block_size=4,
        cache_bytes=blocks * 4 * slot_bytes(model.module, PagedBackend(kept=E4M3)),
        swap_bytes=swap,
        batch_invariant=invariant,
    )
    assert batch.scheduler.manager.blocks == blocks
    assert [answer.token_ids for answer in engine.generate(texts, sampling)] == expected


def test_the_loss_is_small_and_the_memory_less(model):
    prompt = "The cat sat on the mat and looked at the moon."
    asked = Sampling(max_tokens=1, temperature=0, prompt_logprobs=0)
    found = [
        [entry.logprob for entry in Engine(model, cache_dtype=kind).generate([prompt], asked)[0].prompt_logprobs[1:]]
        for kind in ("auto", "fp8")
    ]
    whole, eight = torch.tensor(found[0]), torch.tensor(found[1])
    assert 0 < (whole - eight).abs().mean() < 0.2 and (whole - eight).mean().abs() < 0.1
    shapes = [layer.mixer.attention(model.spec.width) for layer in model.spec.layers]
    kept = sum(2 * shape.key_heads * (shape.head_dim + 4) for shape in shapes)
    assert slot_bytes(model.module, PagedBackend(kept=E4M3)) == kept
    assert Engine(model, cache_dtype="fp8", cache_bytes=2**20).budget.slot_bytes == kept


def test_other_precisions_and_caches_are_refused(model):
    with pytest.raises(UnsupportedError, match="auto or fp8, 'fp4' given"):
        Engine(model, cache_dtype="fp4")
    with pytest.raises(UnsupportedError, match="a cache in fp8 needs keys and values in blocks"):
        Engine(model, cache_dtype="fp8", paged=False)
