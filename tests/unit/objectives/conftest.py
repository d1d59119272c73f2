"""Shards of tiny text, and a vocabulary made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from training_data import make_shards

from luban.data.collate.special_tokens import SpecialTokens


@pytest.fixture(scope="session")
def shards_path(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("objectives"))


@pytest.fixture(scope="session")
def marks() -> SpecialTokens:
    """Ids 0…9 special (0 begin, 1 end, 2 pad, 3 mask), 10…59 begin words, 60…109 continue them, 10…14 end sentences."""
    ids = np.arange(110)
    return SpecialTokens(
        size=110,
        pad=2,
        begin=0,
        end=1,
        special=ids < 10,
        continues=ids >= 60,
        goes_on=ids >= 10,
        ends_sentence=(ids >= 10) & (ids < 15),
        names={"[MASK]": 3, "[SEP]": 4},
    )
