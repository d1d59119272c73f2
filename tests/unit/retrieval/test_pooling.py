"""Sentence encoders: vectors equal those that transformers computes by the files' own pooling."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import luban
from luban.core.errors import ArtifactError, UnsupportedError
from luban.load.pooling import Pooling, read_pooling
from luban.retrieval.encoder import TextEncoder
from luban.serve.embedder import pooled

TEXTS = ["the cat sat", "dogs", "a cat and the dog and the cat sat and sat"]


def write_modules(folder, pooling, *more, **transformer):
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), *more]
    (folder / "modules.json").write_text(json.dumps([{"type": f"x.{kind}", "path": path} for kind, path in modules]))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps(transformer))


@pytest.fixture
def bert(tmp_path):
    """A random BERT with a vocabulary, as sentence-transformers stores one."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "dogs", "dog", "and", "a"]
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, model, tokenizer


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
@pytest.mark.parametrize("normalise", [True, False])
def test_vectors_are_those_of_transformers(bert, mode, normalise):
    folder, model, tokenizer = bert
    flags = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "max": "pooling_mode_max_tokens"}
    more = [("Normalize", "2_Normalize")] if normalise else []
    write_modules(folder, {flags[mode]: True, "word_embedding_dimension": 16}, *more, max_seq_length=8)
    encoder = TextEncoder(luban.load_model(folder))
    expected = []
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=8)
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state[0]
        vector = {"mean": hidden.mean(0), "cls": hidden[0], "max": hidden.amax(0)}[mode]
        expected.append((vector / vector.norm() if normalise else vector).numpy())
    np.testing.assert_allclose(encoder.passages(TEXTS), np.stack(expected), atol=2e-6)


def test_prompts_are_put_before_queries_and_passages(bert):
    folder, _, _ = bert
    write_modules(folder, {"pooling_mode": "mean"})
    prompts = {"query": "the ", "document": "dogs "}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    encoder = TextEncoder(luban.load_model(folder))
    plain = encoder.embedder.embed(encoder.embedder.fitted(["the cat", "dogs cat"])[0]).numpy()
    np.testing.assert_array_equal(encoder.queries(["cat"])[0], plain[0])
    np.testing.assert_array_equal(encoder.passages(["cat"])[0], plain[1])


def test_unknown_poolings_are_refused(tmp_path):
    assert read_pooling(tmp_path) == Pooling()
    write_modules(tmp_path, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True})
    with pytest.raises(UnsupportedError, match="mean and max"):
        read_pooling(tmp_path)
    write_modules(tmp_path, {"pooling_mode": "weightedmean"})
    with pytest.raises(UnsupportedError, match="weightedmean"):
        read_pooling(tmp_path)
    write_modules(tmp_path, {"pooling_mode": "mean"}, ("Dense", "2_Dense"))
    with pytest.raises(UnsupportedError, match="Dense"):
        read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        read_pooling(tmp_path)


def test_padding_is_read_by_no_pooling():
    hidden, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    spoilt = torch.where(mask[:, :, None], hidden, torch.nan)
    for mode in ("mean", "cls", "max", "last"):
        rows = [
            {"mean": h.mean(0), "cls": h[0], "max": h.amax(0), "last": h[-1]}[mode]
            for h in (hidden[i][mask[i]] for i in range(3))
        ]
        torch.testing.assert_close(pooled(spoilt, mask, mode), torch.stack(rows))
