"""Tokens on disk, memory-mapped: `SPLIT-00000.tokens`, `.offsets` and, for conversations, `.mask`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luban.core.artifact import open_artifact
from luban.core.errors import ArtifactError, DataError
from luban.core.lineage import require_same

FORMAT = 1


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits, else uint32; little-endian on every machine."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def split_file(folder: Path, split: str, what: str) -> Path:
    """Where a split's `tokens`, `offsets` or `mask` are."""
    return folder / f"{split}-00000.{what}"


@dataclass(frozen=True, kw_only=True, eq=False)  # one that is open is itself alone
class Shards:
    """One split of packed documents."""

    path: Path  # the artifact's directory
    split: str  # train or heldout
    data: np.ndarray  # (tokens,) ids, memory-mapped
    offsets: np.ndarray  # (documents + 1,) int64: where each document begins
    mask: np.ndarray | None  # (tokens,) uint8, 1 = a target; None: every token is one
    config: dict[str, Any]  # dtype, vocab_size, tokenizer_hash, pad_id, kind
    bytes: int  # UTF-8 bytes of the split's text
    content_hash: str  # of the artifact

    @classmethod
    def open(cls, path: str | Path, split: str = "train", *, verify: bool = False) -> Shards:
        """Open the shards at `path`; their tokens are read when they are asked for.

        Args:
            verify: read and hash every file first.

        Raises:
            ArtifactError: no shards, or a file that was truncated, or (with `verify`) edited.
            DataError: the split is empty.
        """
        path = Path(path)
        manifest = open_artifact(path, "shards", verify=verify)
        figures = manifest.figures.get(split)
        if not figures or not figures["documents"]:
            raise DataError(
                f"shards {path} hold no {split} documents: they are too few, or the corpus was built without a held-out part"
                if split == "heldout"
                else f"shards {path} hold no {split} documents"
            )
        data = np.memmap(split_file(path, split, "tokens"), dtype=manifest.config["dtype"], mode="r")
        offsets = np.fromfile(split_file(path, split, "offsets"), dtype="<i8")
        mask_file = split_file(path, split, "mask")
        mask = np.memmap(mask_file, dtype=np.uint8, mode="r") if mask_file.is_file() else None
        if offsets[-1] != len(data) or (mask is not None and len(mask) != len(data)):
            raise ArtifactError(
                f"{path} is damaged: the {split} offsets end at {offsets[-1]}, and there are {len(data)} tokens"
            )
        return cls(
            path=path,
            split=split,
            data=data,
            offsets=offsets,
            mask=mask,
            config=manifest.config,
            bytes=figures["bytes"],
            content_hash=manifest.content_hash,
        )

    @property
    def tokens(self) -> int:
        """Tokens in the split."""
        return len(self.data)

    @property
    def documents(self) -> int:
        """Documents in the split."""
        return len(self.offsets) - 1

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer that made the tokens."""
        return self.config["vocab_size"]

    @property
    def tokenizer_hash(self) -> str:
        """Identity of the tokenizer that made the tokens."""
        return self.config["tokenizer_hash"]

    @property
    def pad_id(self) -> int:
        """Id of the padding token; never a target."""
        return self.config["pad_id"]

    @property
    def has_mask(self) -> bool:
        """True if only some tokens are targets (conversations)."""
        return self.mask is not None

    def document(self, index: int) -> np.ndarray:
        """The token ids of one document."""
        return np.asarray(self.data[self.offsets[index] : self.offsets[index + 1]])

    def require_tokenizer(self, content_hash: str | None, owner: str) -> None:
        """Raise LineageError unless `owner`'s tokenizer is the one that made these tokens."""
        require_same(
            "tokenizer",
            f"shards {self.path}",
            self.tokenizer_hash,
            owner,
            content_hash or "none",
            f"pack the corpus again with the tokenizer of {owner}",
        )
