"""Prompts of reinforcement learning from files and from corpora."""

from __future__ import annotations

import json

import pytest
from tiny_models import write_byte_tokenizer

from luban.align.preferences import as_preference_shards, read_groups
from luban.align.prompts import Prompts, as_prompt_shards
from luban.align.rewards.function import FunctionReward
from luban.core.artifact import read_manifest
from luban.core.errors import ConfigError, DataError
from luban.corpus.build import build_corpus
from luban.corpus.reader import read_corpus
from luban.data.shards import Shards
from luban.tokenizer.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer(tmp_path):
    write_byte_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


def test_a_corpus_of_conversations_gives_its_prompts_without_the_last_answers(tmp_path, tokenizer):
    rows = [
        {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"secret {i}"}]}
        for i in range(60)
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_corpus([str(tmp_path / "talk.jsonl")], tmp_path / "corpus", seed=0)
    path = as_prompt_shards(tmp_path / "corpus", tokenizer, tmp_path / "cache", 0)
    assert path == as_prompt_shards(tmp_path / "corpus", tokenizer, tmp_path / "cache", 0)
    for split in ("train", "heldout"):
        prompts = Prompts.open(Shards.open(path, split), 100)
        asked = {tokenizer.decode(ids, skip_special=False) for ids in prompts.ids}
        wanted = {document.messages[0]["content"] for document in read_corpus(tmp_path / "corpus", split)}
        assert len(asked) == len(wanted) > 0
        assert all(any(f">{text}<" in each for each in asked) for text in wanted)
        assert not any("secret" in each for each in asked) and all(each.endswith("<|assistant|>") for each in asked)
    assert {parent.role for parent in read_manifest(path).parents} == {"corpus"}


def test_files_and_artifacts_of_another_kind_are_named(tmp_path, tokenizer):
    (tmp_path / "plain.txt").write_text("a text\n")
    build_corpus([str(tmp_path / "plain.txt")], tmp_path / "plain", seed=0)
    with pytest.raises(DataError, match="a corpus conversations"):
        as_prompt_shards(tmp_path / "plain", tokenizer, tmp_path / "cache", 0)
    with pytest.raises(DataError, match=r"plain is a corpus: --data\.path takes a \.jsonl file of preferences"):
        as_preference_shards(tmp_path / "plain", tokenizer, tmp_path / "cache", 0)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"question": "q", "good": "a"}) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: no 'chosen'; a row needs prompt, chosen and rejected"):
        list(read_groups(tmp_path / "pairs.jsonl"))
    (tmp_path / "reward.py").write_text("def short(prompt, answer, row):\n    return 0\n")
    with pytest.raises(ConfigError, match="there is no such function in the file, but short"):
        FunctionReward(tmp_path / "reward.py", "long", 1.0)
