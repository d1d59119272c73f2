"""Cross-encoders: scores equal to transformers', training, and the order that they put passages in."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import warm

from luban.core.errors import DataError, UnsupportedError
from luban.load.model import load_model
from luban.retrieval.building import IndexConfig, build_index
from luban.retrieval.documents import DocumentReader
from luban.retrieval.index import Index
from luban.retrieval.passages.document import WholeDocument
from luban.retrieval.reranking import CrossEncoder, Reranked
from luban.retrieval.training.cross import RerankerRecipe, train_reranker

transformers = pytest.importorskip("transformers", reason="needs transformers")

WORDS = [
    "red",
    "blue",
    "green",
    "round",
    "square",
    "heavy",
    "light",
    "old",
    "new",
    "cat",
    "dog",
    "bird",
    "sea",
    "sun",
    "tree",
    "what",
    "which",
    "is",
    "the",
    "of",
]


def write_bert(folder, labels: int = 1, seed: int | None = None):
    """A random BERT of two layers with its vocabulary: (model, tokenizer) of transformers."""
    folder.mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)})
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        num_labels=labels,
        initializer_range=0.3,
    )
    torch.manual_seed(random.randrange(1000) if seed is None else seed)
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def text(words: int) -> str:
    return " ".join(random.choices(WORDS, k=words))


@torch.no_grad()
def test_scores_are_those_of_transformers(tmp_path):
    model, tokenizer = write_bert(tmp_path / "cross")
    encoder = CrossEncoder.load(tmp_path / "cross")
    for length in (3, 45):  # passages longer than the context are cut
        question, passages = text(4), [text(random.randint(1, length)) for _ in range(5)]
        found = encoder.scores(question, passages)
        for passage, score in zip(passages, found, strict=True):
            inputs = tokenizer(question, passage, truncation="only_second", max_length=40, return_tensors="pt")
            assert score == pytest.approx(model(**inputs).logits.item(), abs=1e-4)


def test_other_models_are_refused(tmp_path, tiny_checkpoint):
    write_bert(tmp_path / "two", labels=2)
    for path in (tmp_path / "two", tiny_checkpoint):
        with pytest.raises(UnsupportedError, match="is no cross-encoder"):
            CrossEncoder.load(path)
    with pytest.raises(DataError, match="doesn't say how two texts are joined"):
        load_model(tiny_checkpoint).need_tokenizer().pair([1], [2])


def test_training_puts_the_answering_passage_first(tmp_path):
    """A passage answers where it holds the word that the question names; BM25 takes the filling words."""
    random.seed(3)
    write_bert(tmp_path / "start", seed=3)
    things = ["cat", "dog", "bird", "sea", "sun", "tree", "red", "blue", "green", "round"]
    rows, texts = [], []
    for number, thing in enumerate(things * 12):
        passage = {"title": "", "text": f"{thing} {text(2)} new{' old' * (number % 3)}"}
        wrong = [
            {"title": "", "text": f"{other} which is the {text(1)}"}
            for other in random.sample(things, 4)
            if other != thing
        ]
        question = f"which is the {thing}"
        rows.append({"question": question, "answers": [thing], "positive_ctxs": [passage], "hard_negative_ctxs": wrong})
        texts += [passage["text"], *(w["text"] for w in wrong)]
    data = tmp_path / "questions.json"
    data.write_text(json.dumps(rows))
    recipe = RerankerRecipe(data=data, encoder=str(tmp_path / "start"), epochs=10, lr=3e-3, negatives=3, heldout=0.0)
    figures = train_reranker(recipe, tmp_path / "cross")
    assert figures["first_loss"] > 1 and figures["last_loss"] < 0.3
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in dict.fromkeys(texts)))
    build_index(DocumentReader([str(tmp_path / "texts.jsonl")]), tmp_path / "index", IndexConfig(rule=WholeDocument()))
    index = Index(tmp_path / "index")
    reranked = Reranked(index, CrossEncoder.load(tmp_path / "cross"), depth=60)
    before, after = (
        [f"{thing} " in s.search(f"which is the {thing}", 1)[0].passage.text for thing in things]
        for s in (index, reranked)
    )
    assert np.mean(after) >= 0.8 and np.mean(after) >= np.mean(before)
    hits = reranked.search("which is the cat", 4)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True) and len(hits) == 4
    words = (
        "rag",
        "search",
        tmp_path / "index",
        "which is the sea",
        "--rerank",
        tmp_path / "cross",
        "--k",
        2,
        "--json",
    )
    done = warm.command(*words)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 2, done.stderr
    done = warm.command(
        "rag", "eval", tmp_path / "index", data, "--rerank", tmp_path / "cross", "--depth", 10, "--limit", 5
    )
    assert done.returncode == 0 and "bm25, re-ranked" in done.stdout, done.stderr
