from __future__ import annotations

import pytest
from packable import conversations, texts

from luban.data.pack import pack
from luban.tokenizer.train import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    out = tmp_path_factory.mktemp("tok") / "t"
    return train_tokenizer([d.text for d in texts(200, seed=1)], out, vocab_size=300)


@pytest.fixture(scope="session")
def text_shards(tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "s"
    pack({"train": texts(150, seed=2), "heldout": texts(20, seed=3)}, tokenizer.path, out)
    return out


@pytest.fixture(scope="session")
def chat_shards(tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "s"
    pack({"train": conversations(150, seed=2), "heldout": conversations(20, seed=3)}, tokenizer.path, out)
    return out
