"""Tiny text and conversations, packed as a user would, for the tests that train."""

from __future__ import annotations

import json
import random
from pathlib import Path

from luban.core.artifact import as_parent
from luban.corpus.build import build_corpus
from luban.corpus.reader import read_corpus
from luban.data.pack import pack
from luban.tokenizer.train import train_tokenizer

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "river",
    "hill",
    "sun",
    "wind",
    "ran",
    "sat",
    "over",
    "under",
    "bright",
    "slow",
    "quick",
    "old",
    "new",
    "red",
    "blue",
    "green",
]


def write_text(folder: Path, documents: int = 30, words: int = 120, seed: int = 0) -> Path:
    """A folder of text files of random words."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for i in range(documents):
        (folder / f"{i}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(words)))
    return folder


def write_conversations(file: Path, count: int = 60, seed: int = 0) -> Path:
    """A .jsonl of questions whose answers repeat the question's words."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        one, two = draw.choice(WORDS), draw.choice(WORDS)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"say {one} and {two} {i}"},
                    {"role": "assistant", "content": f"{two} {one}"},
                ]
            }
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_shards(folder: Path, *, vocab_size: int = 300, seed: int = 0) -> Path:
    """Corpus, tokenizer and shards under `folder`; returns the shards."""
    build_corpus([str(write_text(folder / "text", seed=seed))], folder / "corpus", heldout=0.2)
    texts = (document.text for document in read_corpus(folder / "corpus"))
    train_tokenizer(
        texts, folder / "tokenizer", vocab_size=vocab_size, parents=(as_parent("corpus", folder / "corpus"),)
    )
    splits = {split: read_corpus(folder / "corpus", split) for split in ("train", "heldout")}
    pack(splits, folder / "tokenizer", folder / "shards", parents=(as_parent("corpus", folder / "corpus"),))
    return folder / "shards"


def tensors(batch) -> dict:
    """A batch as a loss module reads it."""
    import numpy as np
    import torch

    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.arrays().items()}


def cut(batch: dict, pieces: int) -> list[dict]:
    """The batch's rows in so many micro-batches."""
    parts = {name: tensor.chunk(pieces) for name, tensor in batch.items()}
    return [{name: chunks[i] for name, chunks in parts.items()} for i in range(pieces)]
