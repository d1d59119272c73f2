"""Prompts of reinforcement learning: rows of a file → shards of token ids, the rest of each row beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luban.align.preferences import Text, as_messages, heldout_prompts, require_text, shards_config, tokenizer_parents
from luban.core.artifact import MANIFEST, ArtifactWriter, open_artifact
from luban.core.errors import DataError
from luban.core.hashing import data_sha256, file_sha256
from luban.core.jsonl import read_rows, write_rows
from luban.core.log import say, warn
from luban.data.pack import copy_tokenizer
from luban.data.shards import Shards, split_file, token_dtype
from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import Tokenizer

FIELDS = ("prompt", "question", "messages")  # where a row's prompt is, in this order


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The prompts of a split."""

    ids: list[list[int]]  # token ids, up to where the answer begins
    rows: list[dict[str, Any]]  # the rows of the file

    @classmethod
    def open(cls, shards: Shards, longest: int) -> Prompts:
        """Those of at most `longest` tokens; how many are left out is said. Raises DataError where none is left."""
        rows = [row for _, row in read_rows(split_file(shards.path, shards.split, "rows"))]
        ids = [shards.document(i).tolist() for i in range(shards.documents)]
        kept = [i for i, each in enumerate(ids) if len(each) <= longest]
        if not kept:
            raise DataError(
                f"every {shards.split} prompt has more than {longest} tokens, which train.seq_len less rl.max_tokens leaves "
                f"for it: raise train.seq_len"
            )
        if len(kept) < len(ids):
            warn(
                f"{len(ids) - len(kept)} of {len(ids)} {shards.split} prompts have more than {longest} tokens and are left "
                f"out: raise train.seq_len to keep them"
            )
        return cls(ids=[ids[i] for i in kept], rows=[rows[i] for i in kept])


def prompt_of(row: dict[str, Any]) -> Text:
    """A row's prompt: text or messages, without a final answer. Raises DataError where there is none."""
    prompt = next((row[name] for name in FIELDS if row.get(name)), None)
    if prompt is None:
        raise DataError(f"no prompt: a row needs one of {', '.join(FIELDS)}")
    require_text(prompt)
    if isinstance(prompt, list) and prompt and prompt[-1].get("role") == "assistant":
        prompt = prompt[:-1]
    if not prompt:
        raise DataError("the prompt is empty")
    return prompt


def prompt_ids(prompt: Text, tokenizer: Tokenizer) -> list[int]:
    """Token ids up to where the answer begins."""
    if tokenizer.chat_template is None and isinstance(prompt, str):
        return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(prompt)]
    return render(as_messages(prompt, "user"), tokenizer, add_generation_prompt=True).token_ids


def as_prompt_shards(path: Path, tokenizer: Tokenizer, cache: Path, seed: int) -> Path:
    """Prompt shards for `path`: shards of prompts already, or a .jsonl file with `prompt`, `question` or `messages`.

    Raises:
        DataError: nothing there, or a row without a prompt.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: --data.path takes a .jsonl file of prompts")
    if path.is_dir():
        if "prompts" not in open_artifact(path, "shards", verify=False).config:
            raise DataError(f"shards {path} hold no prompts: give a .jsonl file with a prompt a row")
        return path
    out = cache / f"prompts-{data_sha256([file_sha256(path), tokenizer.content_hash, seed])[:12]}"
    if not (out / MANIFEST).is_file():
        say(f"packing {path} into {out}")
        _pack(path, tokenizer, out, seed)
    return out


def _pack(file: Path, tokenizer: Tokenizer, out: Path, seed: int) -> None:
    rows, prompts, ids = [], [], []
    for number, row in read_rows(file):
        try:
            prompt = prompt_of(row)
            ids.append(prompt_ids(prompt, tokenizer))
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from None
        rows.append(row)
        prompts.append(prompt)
    if not rows:
        raise DataError(f"{file} has no prompt")
    heldout = heldout_prompts(prompts, seed)
    dtype = token_dtype(tokenizer.vocab_size)
    config = {**shards_config(tokenizer, dtype, groups=0), "prompts": 1}
    with ArtifactWriter(out, kind="shards", config=config, parents=tokenizer_parents(tokenizer)) as art:
        copy_tokenizer(tokenizer, art.path / "tokenizer")
        for split in ("train", "heldout"):
            taken = [i for i, p in enumerate(prompts) if (data_sha256(p) in heldout) == (split == "heldout")]
            tokens = np.array([token for i in taken for token in ids[i]], dtype=dtype)
            tokens.tofile(split_file(art.path, split, "tokens"))
            offsets = np.cumsum([0, *(len(ids[i]) for i in taken)])
            offsets.astype("<i8").tofile(split_file(art.path, split, "offsets"))
            write_rows(split_file(art.path, split, "rows"), [rows[i] for i in taken])
            art.figures[split] = {"documents": len(taken), "tokens": len(tokens), "bytes": 0}
