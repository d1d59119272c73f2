"""Bits per byte against a sum over documents."""

from __future__ import annotations

import math

import pytest
import torch

from luban.data.shards import Shards
from luban.train.run import make_engine
from luban.train.start import choose_start
from luban.train.validate import Validator


def test_bits_per_byte_of_a_uniform_model_is_its_code_length(tiny, shards):
    recipe = tiny()
    data = Shards.open(shards)
    engine = make_engine(recipe, choose_start(recipe, data), torch.device("cpu"))
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()  # every logit 0: each token costs log2 V bits
    heldout = Shards.open(shards, "heldout")
    for batches in (0, 1):
        found = Validator(heldout, batch_size=4, seq_len=32, batches=batches)(engine)
        targets = heldout.tokens - heldout.documents
        assert found.loss == pytest.approx(math.log(heldout.vocab_size), rel=1e-5)
        assert found.bits_per_byte == pytest.approx(targets * math.log2(heldout.vocab_size) / heldout.bytes, rel=1e-5)
        assert (found.tokens == targets) == (batches == 0)
