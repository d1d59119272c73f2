"""Sentence encoders: texts → vectors, with an identity that an index remembers.

B texts, E width of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from luban.checkpoint.weights import weights_hash
from luban.core.artifact import Parent
from luban.core.errors import DataError, LineageError
from luban.core.log import warn
from luban.load.model import LoadedModel, load_model
from luban.models.build import state_of
from luban.retrieval.packaged import located
from luban.serve.embedder import Embedder

QUESTIONS = "question_encoder"  # folder, inside of a passage encoder's, of the one that reads questions


class TextEncoder:
    """Vectors of queries and passages.

    Args:
        model: any model of Transformer layers with a tokenizer; its pooling is that of the files beside it.
        questions: reads queries, where they have an encoder of their own as in DPR.

    Raises:
        UnsupportedError: a model without Transformer layers, or a pooling that isn't built.
        DataError: it has no tokenizer.
    """

    def __init__(self, model: LoadedModel, questions: LoadedModel | None = None):
        self.model, self.embedder = model, Embedder(model)
        self.questions = questions or model
        self.question_embedder = self.embedder if questions is None else Embedder(questions)
        for each in (model, self.questions):
            each.need_tokenizer()
        if self.questions.spec.width != model.spec.width:
            raise DataError(
                f"the encoders of {model.name} give vectors of different widths: {model.spec.width} for passages, "
                f"{self.questions.spec.width} for questions"
            )

    @classmethod
    def load(cls, name: str | Path, device: str = "cpu", dtype: str = "float32") -> TextEncoder:
        """By path, or by the name of one that a package carries (minilm). Raises ArtifactError where there is none."""
        path = located(name, "encoder")
        own = Path(path) / QUESTIONS
        questions = load_model(own, device, dtype) if own.is_dir() else None
        return cls(replace(load_model(path, device, dtype), name=Path(name).resolve().name), questions)

    @property
    def width(self) -> int:
        """E."""
        return self.model.spec.width

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be the same when an index is built and when it is queried."""
        found = _identity(self.embedder)
        if self.questions is not self.model:
            found["questions"] = _identity(self.question_embedder)
        return found

    @property
    def parents(self) -> tuple[Parent, ...]:
        """Encoder and tokenizer as ancestors of an index."""
        tokenizer = self.model.need_tokenizer()
        weights, name = self.identity["weights_hash"], self.model.name
        return (
            Parent(role="encoder", kind="model", content_hash=weights, name=name),
            Parent(role="tokenizer", kind="tokenizer", content_hash=tokenizer.content_hash or "", name=name),
        )

    def require(self, identity: dict[str, Any], index: str) -> None:
        """Raise LineageError unless this is the encoder of `identity`, and say in which of its parts it differs."""
        for part, was in identity.items():
            now = self.identity[part]
            if was != now:
                shown = [value[:12] if isinstance(value, str) else value for value in (was, now)]
                if part == "questions":
                    shown = ["another", "this one"]
                raise LineageError(
                    f"{index} was built with another encoder than {self.model.name} ({part} {shown[0]}, now {shown[1]}): "
                    "query it with the encoder that built it, or build it again"
                )

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """(B, E) float32; texts longer than the encoder reads are cut, which is said once."""
        return _encode(self.embedder, [self.embedder.pooling.passage_prompt + text for text in texts], "passages")

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """(B, E) float32, as `passages` with the prompt for queries."""
        embedder = self.question_embedder
        return _encode(embedder, [embedder.pooling.query_prompt + text for text in texts], "a query")


def _identity(embedder: Embedder) -> dict[str, Any]:
    tokenizer = embedder.model.need_tokenizer()
    return {
        "weights_hash": weights_hash(state_of(embedder.model.module)),
        "tokenizer": tokenizer.content_hash,
        "pooling": asdict(embedder.pooling),
    }


def _encode(embedder: Embedder, texts: Sequence[str], what: str) -> np.ndarray:
    ids, cut = embedder.fitted(texts)
    if cut:
        warn(f"{what}: cut to the {embedder.longest} tokens that {embedder.model.name} reads")
    vectors = embedder.embed(ids).numpy()
    if not np.isfinite(vectors).all():
        raise DataError(f"{embedder.model.name} gives vectors that are NaN or infinite: its weights are damaged")
    return vectors
