"""Documents + tokenizer → shards, in bounded memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from luban.core.artifact import MANIFEST, ArtifactWriter, Parent, as_parent, read_manifest
from luban.core.errors import DataError
from luban.core.log import Bar, progress, warn
from luban.core.rounds import rounds
from luban.data.shards import FORMAT, split_file, token_dtype
from luban.tokenizer.chat import render
from luban.tokenizer.settings import SETTINGS_FILES
from luban.tokenizer.tokenizer import FILE, Tokenizer, load_tokenizer

ROUND_CHARACTERS = 4 << 20  # characters of text tokenised at a time


class Packable(Protocol):
    """Document interface needed for packing."""

    @property
    def id(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def messages(self) -> list[dict[str, Any]] | None: ...
    @property
    def tools(self) -> list[dict[str, Any]] | None: ...


@dataclass
class Counts:
    """Counts of one split."""

    documents: int = 0
    conversations: int = 0
    dropped_conversations: int = 0  # conversations left out, with no trainable token
    tokens: int = 0
    trained: int = 0  # tokens with loss mask 1
    bytes: int = 0  # UTF-8 bytes of the text
    offsets: list[int] = field(default_factory=lambda: [0])


def pack(
    splits: Mapping[str, Iterable[Packable]],
    tokenizer: str | Path | Tokenizer,
    out: str | Path,
    *,
    parents: tuple[Parent, ...] = (),
    total: int | None = None,
) -> dict[str, Any]:
    """Tokenise documents into shards at `out`.

    A text becomes BOS + tokens + EOS, and every token but the first is a target; a conversation is rendered by the chat
    template, with the template's loss mask.

    Args:
        splits: split name → its documents, read once.
        tokenizer: a tokenizer, or the directory of one; its files are copied into the shards.
        parents: the artifacts that the documents come from.
        total: number of documents, for the progress bar.

    Returns:
        The manifest's figures: counts of each split.

    Raises:
        DataError: no document, a conversation that the template refuses, or no token to train on.
    """
    known = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    if known.eos_id is None:
        raise DataError(
            f"tokenizer {known.path or ''} has no end-of-text token, so document boundaries could not be found"
        )
    dtype = token_dtype(known.vocab_size)
    config = {
        "dtype": dtype.str,
        "vocab_size": known.vocab_size,
        "tokenizer_hash": known.content_hash,
        "bos_id": known.bos_id,
        "eos_id": known.eos_id,
        "pad_id": known.eos_id if known.pad_id is None else known.pad_id,
    }
    if known.path and (known.path / MANIFEST).is_file() and read_manifest(known.path).kind == "tokenizer":
        parents = (*parents, as_parent("tokenizer", known.path))
    with ArtifactWriter(out, kind="shards", config=config, parents=parents, format=FORMAT) as art:
        copy_tokenizer(known, art.path / "tokenizer")
        with progress("packing", total=total, unit="docs") as bar:
            counts = {
                split: _write(art.path, split, documents, known, dtype, bar) for split, documents in splits.items()
            }
        _check(counts)
        for split, found in counts.items():
            art.figures[split] = {name: value for name, value in vars(found).items() if name != "offsets"}
    return art.figures


def _check(counts: Mapping[str, Counts]) -> None:
    train = next(iter(counts.values()))
    if not train.documents:
        if train.dropped_conversations:
            raise DataError(
                "no conversation has assistant text to train on, so the loss mask would be all zeros "
                f"({train.dropped_conversations} dropped)"
            )
        raise DataError("the corpus has no document to pack")
    dropped = sum(found.dropped_conversations for found in counts.values())
    if dropped:
        warn(f"{dropped} conversations have no assistant text to train on and are left out")


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy a tokenizer's own files, and no other files of its directory; save a tokenizer that has no directory."""
    folder.mkdir()
    if tokenizer.path is None:
        tokenizer.save(folder)
        return
    for name in (FILE, *SETTINGS_FILES):
        if (tokenizer.path / name).is_file():
            shutil.copyfile(tokenizer.path / name, folder / name)
    manifest = tokenizer.path / MANIFEST
    if manifest.is_file() and read_manifest(tokenizer.path).kind == "tokenizer":
        shutil.copyfile(manifest, folder / MANIFEST)


def _write(
    folder: Path, split: str, documents: Iterable[Packable], tokenizer: Tokenizer, dtype: np.dtype, bar: Bar
) -> Counts:
    counts = Counts()
    mask_file = split_file(folder, split, "mask")
    with ExitStack() as files:
        tokens = files.enter_context(open(split_file(folder, split, "tokens"), "wb"))
        masks = files.enter_context(open(mask_file, "wb"))
        for batch in rounds(documents, lambda each: len(each.text), ROUND_CHARACTERS):
            for ids, mask in _tokenise(batch, tokenizer, dtype, counts):
                tokens.write(ids.data)
                masks.write(mask.data)
                counts.documents += 1
                counts.tokens += len(ids)
                counts.trained += int(mask.sum())
                counts.offsets.append(counts.tokens)
            bar.advance(len(batch), note=split)
    np.array(counts.offsets, dtype="<i8").tofile(split_file(folder, split, "offsets"))
    if not counts.conversations:
        mask_file.unlink()
    return counts


def _tokenise(
    batch: list[Packable], tokenizer: Tokenizer, dtype: np.dtype, counts: Counts
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """((tokens,) ids, (tokens,) uint8 mask) of each document in order; conversations without a trainable token are counted
    and left out."""
    encoded = iter(tokenizer.encode_batch([document.text for document in batch if document.messages is None]))
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tail = [tokenizer.eos_id]  # `pack` requires one
    for document in batch:
        if document.messages is None:
            ids = np.array([*head, *next(encoded), *tail], dtype=dtype)
            mask = np.ones(len(ids), dtype=np.uint8)
            mask[:1] = 0  # nothing predicts a document's first token
        else:
            try:
                rendered = render(document.messages, tokenizer, tools=document.tools)
                ids, mask = np.array(rendered.token_ids, dtype=dtype), np.array(rendered.loss_mask, dtype=np.uint8)
            except DataError as error:
                raise DataError(f"document {document.id}: {error}") from None
            if not mask.any():
                counts.dropped_conversations += 1
                continue
            counts.conversations += 1
        counts.bytes += len(document.text.encode())
        yield ids, mask
