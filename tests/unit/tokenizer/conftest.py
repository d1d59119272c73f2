import random

import pytest

from luban.tokenizer.train import train_tokenizer

WORDS = [
    "def",
    "return",
    "import",
    "self",
    "the",
    "of",
    "and",
    "tokens",
    "你好",
    "世界",
    "été",
    "naïve",
    "😀",
    "0x1F",
    "3.14",
    "foo_bar",
    "==",
    "!=",
    "\t\t",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + rng.choice(["\n", "\n\n", ""]) for _ in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return sentences(400)


SIZES = {"bpe": 400, "wordpiece": 620, "unigram": 320, "char": 300, "charbpe": 400, "chinese": 400}


@pytest.fixture(scope="session", params=sorted(SIZES))
def trained(request, texts, tmp_path_factory):
    """A tokenizer of every algorithm."""
    out = tmp_path_factory.mktemp("tok") / request.param
    return train_tokenizer(texts, out, algorithm=request.param, vocab_size=SIZES[request.param])


@pytest.fixture(scope="session")
def bpe(texts, tmp_path_factory):
    return train_tokenizer(texts, tmp_path_factory.mktemp("tok") / "t", vocab_size=400)
