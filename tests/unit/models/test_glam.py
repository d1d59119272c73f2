"""GLaM's presets have the published sizes, and the small one learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from families import Family, engine_of

from luban.data.batch import Batch
from luban.models.describe import describe
from luban.models.presets import PRESETS
from luban.nn.moe.layer import MixtureOfExperts
from luban.objectives.causal import Causal

# Du et al. 2022, table 4: parameters, parameters that a token uses, in billions, to as many digits as are printed
PUBLISHED = [("glam-1.7b-64e", 27, 0, 1.879, 3), ("glam-8b-64e", 143, 0, 9.8, 1), ("glam-64b-64e", 1200, -2, 96.6, 1)]


@pytest.mark.parametrize(("name", "whole", "digits", "active", "active_digits"), PUBLISHED)
def test_sizes_are_the_published_ones(name, whole, digits, active, active_digits):
    graph = describe(PRESETS[name], batch=1, seq=2)
    assert round(graph.parameters / 1e9, digits) == whole
    assert graph.active_parameters / 1e9 == pytest.approx(active, abs=0.51 * 10**-active_digits)


def test_every_second_layer_is_a_mixture_of_two_experts_a_token():
    for name in ("glam-tiny", "glam-64b-64e"):
        networks = [layer.feedforward for layer in PRESETS[name].layers]
        assert [isinstance(network, MixtureOfExperts) for network in networks] == [False, True] * (len(networks) // 2)
        assert {n.router.chosen for n in networks[1::2]} == {2}
    assert PRESETS["glam-64b-64e"].layers[1].feedforward.experts == 64


def test_the_small_one_learns_texts_by_heart():
    words, rows, tokens = 96, 4, 24
    rng = np.random.default_rng()
    texts = rng.integers(0, words, (rows, tokens + 1)).astype(np.int64)
    batch = Batch(
        tokens=texts[:, :-1],
        targets=texts[:, 1:],
        loss_mask=np.ones((rows, tokens), dtype=bool),
        documents=np.zeros((rows, tokens), dtype=np.int32),
        positions=np.tile(np.arange(tokens, dtype=np.int32), (rows, 1)),
    )
    spec = replace(PRESETS["glam-tiny"], vocab_size=words)
    engine = engine_of(Family(spec, Causal(), lambda *_: batch), seed=0)
    results = [engine.step(batch) for _ in range(60)]
    assert abs(results[0].loss - np.log(words)) < 0.5 and results[-1].loss < 0.5
    assert 1 <= results[-1].metrics["expert_load_max"] <= 8
