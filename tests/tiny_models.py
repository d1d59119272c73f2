"""Small models and vocabularies on disk."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

SPECIALS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
    *(f"<|reserved_{i}|>" for i in range(9)),
)


def write_byte_tokenizer(folder: Path) -> None:
    """A byte-level vocabulary of 16 special tokens and 256 bytes, in the Hugging Face layout."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate((*SPECIALS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template = importlib.resources.files("luban.tokenizer").joinpath("chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)


def write_checkpoint(folder: Path, spec, seed: int = 0) -> Path:
    """A checkpoint of random weights with a byte-level tokenizer."""
    from safetensors.torch import save_file

    from luban import build_model
    from luban.models.build import state_of
    from luban.models.spec import write_spec

    folder.mkdir(parents=True)
    write_spec(spec, folder)
    save_file(state_of(build_model(spec, seed=seed)), folder / "model.safetensors")
    write_byte_tokenizer(folder / "tokenizer")
    return folder
