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

ROUND_BYTES = 4 << 20  # text bytes tokenised at a time


class Packable(Protocol):
    """What a corpus's documents offer here."""

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
    """What one split holds."""

    documents: int = 0
    conversations: int = 0
    untrained: int = 0  # conversations dropped, since nothing in them is a target
    tokens: int = 0
    trained: int = 0  # tokens with the mask on
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

    A text becomes BOS + tokens + EOS, all of it trained on; a conversation becomes what the chat template
    makes of it, with the template's loss mask.

    Args:
        splits: split name → its documents, read once.
        tokenizer: a tokenizer, or the directory of one; its files are copied into the shards.
        parents: what the documents come from.
        total: documents in all, for the progress bar.

    Returns:
        The figures of the manifest: a table of counts for each split.

    Raises:
        DataError: no document, a conversation that the template refuses, or no token to train on.
    """
    known = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
    if known.eos_id is None:
        raise DataError(f"tokenizer {known.path or ''} has no end-of-text token, so documents could not be told apart")
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
        if train.untrained:
            raise DataError(
                f"the loss mask is all zeros: none of the {train.untrained} conversations has an assistant's "
                f"answer to train on"
            )
        raise DataError("the corpus holds no document to pack")
    dropped = sum(found.untrained for found in counts.values())
    if dropped:
        warn(f"{dropped} conversations have no assistant's answer to train on and are left out")


def copy_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy a tokenizer's own files, and nothing else that stands beside them; write those of one that came from no folder."""
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
        for batch in rounds(documents, lambda each: len(each.text), ROUND_BYTES):
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
    """((tokens,) ids, (tokens,) uint8 mask) of each document in order; conversations without a target are counted and
    left out."""
    encoded = iter(tokenizer.encode_batch([document.text for document in batch if document.messages is None]))
    head = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tail = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    for document in batch:
        if document.messages is None:
            ids = np.array([*head, *next(encoded), *tail], dtype=dtype)
            mask = np.ones(len(ids), dtype=np.uint8)
            mask[:1] = 0  # nothing comes before a document's first token
        else:
            try:
                rendered = render(document.messages, tokenizer, tools=document.tools)
                ids, mask = np.array(rendered.token_ids, dtype=dtype), np.array(rendered.loss_mask, dtype=np.uint8)
            except DataError as error:
                raise DataError(f"document {document.id}: {error}") from None
            if not mask.any():
                counts.untrained += 1
                continue
            counts.conversations += 1
        counts.bytes += len(document.text.encode())
        yield ids, mask
