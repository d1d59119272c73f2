"""A pack as people see it."""

from __future__ import annotations

import pytest
from rich.console import Console

from luban.data.loader import Loader
from luban.data.shards import Shards
from luban.data.show import coloured, document_tokens, row_tokens, token_texts


def test_token_texts_join_to_the_text(tokenizer):
    text = "alpha 你好 été 😀 \n x"
    assert "".join(token_texts(tokenizer.encode(text), tokenizer)) == text


def test_a_document_shows_its_answer_as_trained(chat_shards, tokenizer):
    shards = Shards.open(chat_shards)
    for index in range(20):
        tokens = document_tokens(shards, index, tokenizer)
        assert "".join(t["text"] for t in tokens) == tokenizer.decode(shards.document(index), skip_special=False)
        assert tokens[0] == {"text": "<|bos|>", "trained": False, "document": 0, "position": 0}
        assert tokens[-1]["text"] == "<|end|>" and tokens[-1]["trained"]


@pytest.mark.parametrize("packing", ["fit", "stream"])
def test_a_row_shows_every_document_whole(chat_shards, tokenizer, packing):
    shards = Shards.open(chat_shards)
    loader = Loader(shards, batch_size=2, seq_len=128, seed=1, packing=packing)
    wholes = {tokenizer.decode(shards.document(i), skip_special=False): i for i in range(shards.documents)}
    seen = 0
    for step in range(5):
        batch = loader.batch(step)
        for row in range(2):
            tokens = row_tokens(batch, row, tokenizer)
            assert sum(t["trained"] for t in tokens) == batch.loss_mask[row].sum()
            for document in range(batch.documents[row].max() + 1):
                mine = [t for t in tokens if t["document"] == document]
                assert [t["position"] for t in mine] == list(range(len(mine)))
                index = wholes.get("".join(t["text"] for t in mine))
                if index is not None:
                    seen += 1
                    assert mine == [{**t, "document": document} for t in document_tokens(shards, index, tokenizer)]
                else:
                    assert packing == "stream"
    assert seen > 5


def test_the_mask_is_visible_without_colour(chat_shards, tokenizer):
    console = Console(no_color=True, width=10_000)
    tokens = [
        {"text": text, "trained": on, "document": d, "position": 0}
        for text, on, d in [("q", False, 0), ("a", True, 0), ("b", True, 0), ("x", False, 1), ("y", True, 1)]
    ]
    with console.capture() as captured:
        console.print(coloured(tokens))
        console.print(coloured(tokens, limit=2))
    assert captured.get() == "▌q«ab»\n▌x«y»\n▌q«a» … 3 more tokens\n"
