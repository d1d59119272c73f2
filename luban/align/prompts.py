"""Prompts of reinforcement learning: rows of a file, or conversations of a corpus → shards of token ids, the rest of each row beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luban.align.preferences import Text, as_messages, heldout_prompts, require_text, shards_config, tokenizer_parents
from luban.core.artifact import MANIFEST, ArtifactWriter, Parent, as_parent, open_artifact, read_manifest
from luban.core.errors import DataError
from luban.core.hashing import data_sha256, file_sha256
from luban.core.jsonl import read_rows, write_rows
from luban.core.log import say, warn
from luban.corpus.reader import read_corpus
from luban.corpus.split import SPLITS
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
    """Prompt shards for `path`: shards of prompts already, a .jsonl file with `prompt`, `question` or `messages`, or a corpus of
    conversations, whose last answers are left out and whose held-out split stays held out.

    Raises:
        DataError: nothing there, or a row without a prompt.
    """
    if not path.exists():
        raise DataError(
            f"{path} does not exist: --data.path takes a .jsonl file of prompts, or a corpus of conversations"
        )
    kind = read_manifest(path).kind if path.is_dir() else "file"
    if path.is_dir() and kind != "corpus":
        if "prompts" not in open_artifact(path, "shards", verify=False).config:
            raise DataError(f"shards {path} hold no prompts: give a .jsonl file with a prompt a row")
        return path
    content = read_manifest(path).content_hash if kind == "corpus" else file_sha256(path)
    out = cache / f"prompts-{data_sha256([content, tokenizer.content_hash, seed])[:12]}"
    if not (out / MANIFEST).is_file():
        say(f"packing {path} into {out}")
        if kind == "corpus":
            _pack(_corpus_rows(path), tokenizer, out, (as_parent("corpus", path),))
        else:
            _pack(_file_rows(path, seed), tokenizer, out)
    return out


@dataclass(frozen=True, kw_only=True)
class _Row:
    where: str  # for messages
    row: dict[str, Any]
    split: str


def _file_rows(file: Path, seed: int) -> list[_Row]:
    rows, prompts = [], []
    for number, row in read_rows(file):
        try:
            prompts.append(prompt_of(row))
        except DataError as error:
            raise DataError(f"{file}:{number}: {error}") from None
        rows.append((f"{file}:{number}", row))
    heldout = heldout_prompts(prompts, seed)
    return [
        _Row(where=where, row=row, split="heldout" if data_sha256(prompt) in heldout else "train")
        for (where, row), prompt in zip(rows, prompts, strict=True)
    ]


def _corpus_rows(path: Path) -> list[_Row]:
    return [
        _Row(where=f"{path}: {document.id}", row={"messages": document.messages}, split=split)
        for split in SPLITS
        for document in read_corpus(path, split)
        if document.messages
    ]


def _pack(rows: list[_Row], tokenizer: Tokenizer, out: Path, parents: tuple[Parent, ...] = ()) -> None:
    ids = []
    for each in rows:
        try:
            ids.append(prompt_ids(prompt_of(each.row), tokenizer))
        except DataError as error:
            raise DataError(f"{each.where}: {error}") from None
    if not rows:
        raise DataError("no prompt in the data: a file needs rows with a prompt, a corpus conversations")
    dtype = token_dtype(tokenizer.vocab_size)
    config = {**shards_config(tokenizer, dtype, groups=0), "prompts": 1}
    with ArtifactWriter(out, kind="shards", config=config, parents=(*tokenizer_parents(tokenizer), *parents)) as art:
        copy_tokenizer(tokenizer, art.path / "tokenizer")
        for split in SPLITS:
            taken = [i for i, each in enumerate(rows) if each.split == split]
            tokens = np.array([token for i in taken for token in ids[i]], dtype=dtype)
            tokens.tofile(split_file(art.path, split, "tokens"))
            offsets = np.cumsum([0, *(len(ids[i]) for i in taken)])
            offsets.astype("<i8").tofile(split_file(art.path, split, "offsets"))
            write_rows(split_file(art.path, split, "rows"), [rows[i].row for i in taken])
            art.figures[split] = {"documents": len(taken), "tokens": len(tokens), "bytes": 0}
