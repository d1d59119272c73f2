"""Conversations, in whatever form they were named, as shards with a loss mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luban.core.artifact import MANIFEST, as_parent, open_artifact, read_manifest
from luban.core.errors import DataError
from luban.core.hashing import data_sha256, file_sha256
from luban.core.log import say
from luban.corpus.build import build_corpus
from luban.corpus.reader import read_corpus
from luban.corpus.split import SPLITS
from luban.corpus.steps.exact import Exact
from luban.data.pack import pack
from luban.data.shards import Shards
from luban.tokenizer.tokenizer import Tokenizer


def as_shards(path: Path, tokenizer: Tokenizer, cache: Path, seed: int) -> Path:
    """Shards of conversations for `path`: shards already, a corpus, or a .jsonl file with `messages`.

    Args:
        tokenizer: the model's, which packs what isn't packed.
        cache: where what is made goes, under a name that depends on the data and the tokenizer.
        seed: of the held-out split of a .jsonl file.

    Raises:
        DataError: nothing there, or no token that would be trained on.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: --data.path takes shards, a corpus of conversations or a .jsonl file")
    if path.is_file():
        path = _corpus_of(path, cache, seed)
    manifest = read_manifest(path)
    if manifest.kind == "shards":
        return require_mask(path)
    open_artifact(path, "corpus", verify=False)
    identity = data_sha256([manifest.content_hash, tokenizer.content_hash])
    out = cache / f"shards-{identity[:12]}"
    if not (out / MANIFEST).is_file():
        say(f"packing {path} into {out}")
        splits = {split: read_corpus(path, split) for split in SPLITS}
        pack(splits, tokenizer, out, parents=(as_parent("corpus", path),))
    say(f"{out}: {_counts(read_manifest(out).figures)}")
    return require_mask(out)


def _counts(figures: dict[str, Any]) -> str:
    """Numbers of conversations to train on, held out and left out, from the figures of shards."""
    train, heldout = (figures[split]["documents"] for split in SPLITS)
    dropped = sum(figures[split].get("dropped_conversations", 0) for split in SPLITS)
    words = f"{train} conversations to train on, {heldout} held out for validation"
    return f"{words}, {dropped} left out, which have no assistant text" if dropped else words


def _corpus_of(file: Path, cache: Path, seed: int) -> Path:
    out = cache / f"corpus-{data_sha256([file_sha256(file), seed])[:12]}"
    if not (out / MANIFEST).is_file():
        build_corpus([str(file)], out, seed=seed)
        for line in left_out(read_manifest(out).figures):
            say(f"{file}: {line}")
    return out


def left_out(figures: dict[str, Any]) -> list[str]:
    """In a line each, what of the conversations a corpus build left out, by its figures."""
    lines = []
    if repeated := figures["dropped"].get(Exact.reason, {}).get("documents"):
        names = ", ".join(sample["id"] for sample in figures["dropped_samples"][Exact.reason])
        lines.append(
            f"{repeated} of {figures['waterfall'][0]['documents']} conversations repeat an earlier one in every turn "
            f"and are left out, such as {names} (to keep them: luban corpus build --steps '')"
        )
    for what, count in figures["unusable"].items():
        lines.append(f"{count} {what} are left out, such as {figures['unusable_samples'][what][0]}")
    return lines


def require_mask(path: Path) -> Path:
    """Return the path of shards that say which tokens are trained on.

    Raises:
        DataError: no mask, one that is all zeros, or one that is all ones, since a template without an
            assistant span gives exactly that.
    """
    shards = Shards.open(path)
    if shards.mask is None:
        raise DataError(
            f"shards {path} hold plain text without a loss mask: pack conversations (a corpus with messages)"
        )
    trained = int(shards.mask.sum(dtype="int64"))
    if trained == 0:
        raise DataError(f"the loss mask of {path} is all zeros: no token would be trained on")
    if trained == shards.tokens:
        raise DataError(f"the loss mask of {path} is all ones: questions would be trained on as well as answers")
    return path
