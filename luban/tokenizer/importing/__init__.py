"""Vocabularies that others made. Each format has `read(path) -> (tokenizers.Tokenizer, Settings)`."""

from __future__ import annotations

from luban.core.registry import Registry

FORMATS = Registry(
    "tokenizer format",
    {
        "tokenizer.json": "luban.tokenizer.importing.library:read",
        "gpt2": "luban.tokenizer.importing.gpt2:read",
        "bert": "luban.tokenizer.importing.bert:read",
        "tekken": "luban.tokenizer.importing.tekken:read",
        "tiktoken": "luban.tokenizer.importing.tiktoken:read",
        "gguf": "luban.tokenizer.importing.gguf:read",
        "sentencepiece": "luban.tokenizer.importing.sentencepiece:read",
    },
)
