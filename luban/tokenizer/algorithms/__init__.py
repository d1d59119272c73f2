"""Ways to learn a vocabulary. Each module has `train(texts, vocab_size, special, cut) -> tokenizers.Tokenizer`.

All of them are lossless on any text: they work on bytes, or fall back to bytes.
"""

from __future__ import annotations

from luban.core.registry import Registry

ALGORITHMS = Registry(
    "tokenizer algorithm",
    {
        "bpe": "luban.tokenizer.algorithms.bpe:train",
        "wordpiece": "luban.tokenizer.algorithms.wordpiece:train",
        "unigram": "luban.tokenizer.algorithms.unigram:train",
        "chinese": "luban.tokenizer.algorithms.chinese:train",
        "charbpe": "luban.tokenizer.algorithms.charbpe:train",
        "char": "luban.tokenizer.algorithms.char:train",
    },
)
