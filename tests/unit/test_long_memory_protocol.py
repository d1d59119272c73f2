"""The protocol of the benchmark of duplication: its sizes, and a first stage whose weights go on being trained."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest
import torch

from luban import build_model


@pytest.fixture
def long_memory(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("long_memory")


def test_buckets_and_their_tokens_are_the_square_root_of_the_row(long_memory):
    sizes = {tokens: long_memory.mixer_of("lsh", tokens, 4) for tokens in (64, 128, 256, 1024)}
    found = {tokens: (mixer.buckets, mixer.span) for tokens, mixer in sizes.items()}
    assert found == {64: (8, 8), 128: (16, 8), 256: (16, 16), 1024: (32, 32)}
    for tokens in range(2, 300):
        assert long_memory.mixer_of("lsh", tokens, 4).buckets >= 2  # refused where odd


def test_the_first_stage_sees_all_tokens_before_and_trains_the_same_weights(long_memory):
    args = argparse.Namespace(
        task="duplicate", mixer="lsh", tokens=24, words=9, width=16, rounds=4, device="cpu", batch=3
    )
    model = build_model(long_memory.model_of(args), seed=1)
    mixer = model.spec.layers[0].mixer
    easy = long_memory.with_mixer(model, long_memory.one_bucket(mixer, args.tokens), "cpu")
    assert all(a is b for a, b in zip(model.parameters(), easy.parameters(), strict=True))
    tokens, targets, counts = long_memory.duplicate(args.batch, args.tokens, args.words, "cpu")
    assert torch.equal(targets[counts], tokens[:, 1 : args.tokens // 2].flatten())
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % args.words
    moved = (easy(tokens) - easy(changed)).abs().amax(-1)
    assert (moved > 0).all()  # every later token sees the first
