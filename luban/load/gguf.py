"""A GGUF file → model and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from luban.core.errors import ArtifactError
from luban.load.tensors import filled
from luban.models.base import Model
from luban.models.convert.base import their_names, to_ours
from luban.models.convert.fields import ReadTable
from luban.models.convert.gguf_file import open_gguf
from luban.models.convert.gguf_keys import TOKENS, unread_keys
from luban.models.convert.gguf_model import ROPE_FACTORS, GGUFModel
from luban.models.spec import ModelSpec
from luban.tokenizer.importing.gguf import begins_with_bos, from_metadata
from luban.tokenizer.tokenizer import Tokenizer


class GGUFContent(NamedTuple):
    """Contents of a GGUF file."""

    spec: ModelSpec
    module: Model
    tokenizer: Tokenizer | None  # none where the file has no vocabulary
    begins_with_bos: bool  # whether texts begin with the begin token
    unread: tuple[str, ...]  # keys that had no meaning here, as "name = value"


def read_gguf(path: Path, device: str, dtype: str) -> GGUFContent:
    """Read a model and its vocabulary.

    Raises:
        ArtifactError: a truncated or damaged file, a missing, surplus or misshapen tensor (named).
        UnsupportedError: an architecture, a quantisation or a vocabulary that isn't read.
    """
    opened = open_gguf(path)
    metadata = ReadTable(opened.metadata)
    form = GGUFModel(metadata.get("general.architecture", ""), frozenset(opened.stored))
    factors = opened.tensor(ROPE_FACTORS) if ROPE_FACTORS in opened.stored else None
    spec = form.spec(metadata, factors)
    if len(spec.layers) > len(opened.stored):
        raise ArtifactError(f"{path} is said to have {len(spec.layers)} layers and holds {len(opened.stored)} tensors")
    module = filled(
        spec, to_ours(form, spec, opened.tensors()), path, device=device, dtype=dtype, named=their_names(form, spec)
    )
    tokenizer = Tokenizer(*from_metadata(metadata)) if metadata.get(TOKENS) else None
    begins = tokenizer is not None and begins_with_bos(metadata)
    return GGUFContent(spec, module, tokenizer, begins, unread_keys(metadata))
