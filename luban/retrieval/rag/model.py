"""A generator and the encoder of questions that was trained with it, as one artifact.

The encoder of passages is never trained, so that an index stays right while questions learn to find in it; any index that
the same encoder of passages built can be asked, which is how knowledge is exchanged.

K passages, E width of their vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from luban.core.artifact import MANIFEST, open_artifact, read_manifest
from luban.core.errors import DataError, LineageError
from luban.load.model import load_model
from luban.nn.precision import at_least_float32
from luban.retrieval.encoder import QUESTIONS, TextEncoder
from luban.retrieval.index import Hit, Index
from luban.retrieval.rag.generator import Generator
from luban.retrieval.rag.marginal import Marginal

KIND = "rag"
GENERATOR = "generator"  # folder of the artifact


@dataclass(frozen=True, kw_only=True)
class Found:
    """The passages of one question."""

    hits: list[Hit]
    priors_K: Tensor  # log p(z|x), at least float32; with gradients where the question's vector has them


@dataclass(frozen=True, kw_only=True)
class RagModel:
    """What answers questions from an index."""

    generator: Generator
    questions: TextEncoder | None  # None: the index searches by its own retriever, which isn't trained
    marginal: Marginal
    k: int  # passages of a question, in training
    temperature: float  # scores are divided by it
    passage_encoder: dict[str, Any] | None  # identity of the encoder that built the index of training

    def require(self, index: Index) -> None:
        """Raise LineageError unless the encoder that this model was trained with built the index."""
        mine, its = self.passage_encoder, index.config["encoder"]
        if self.questions is not None and mine != its:
            what = "has no vectors" if its is None else "was built with another one"
            raise LineageError(
                f"this model finds passages by the vectors of the encoder that it was trained with, and {index.path} {what}: "
                "build the index with that encoder"
            )

    def find(self, index: Index, questions: Sequence[str], k: int) -> list[Found]:
        """The k best passages of each question with their log-probabilities among these k; fewer, or none, where the index
        has no more."""
        if self.questions is None:
            found = index.search_batch(questions, k)
            scores = [torch.tensor([hit.score for hit in hits]) for hits in found]
        else:
            embedder = self.questions.question_embedder
            prompt = embedder.pooling.query_prompt
            vectors_BE = embedder.vectors(embedder.fitted([prompt + question for question in questions])[0])
            found = index.nearest(vectors_BE.detach().float().cpu().numpy(), k)
            scores = [_vectors(index, hits).to(vector) @ vector for hits, vector in zip(found, vectors_BE, strict=True)]
        return [
            Found(hits=hits, priors_K=(at_least_float32(score) / self.temperature).log_softmax(0))
            for hits, score in zip(found, scores, strict=True)
        ]


def _vectors(index: Index, hits: Sequence[Hit]) -> Tensor:
    """(K, E) float32 vectors of the passages."""
    places = np.array([hit.place for hit in hits], dtype=np.int64)
    order = places.argsort()
    return torch.from_numpy(index.vectors.floats(places[order])[order.argsort()])


def is_rag(path: str | Path) -> bool:
    """Whether a path holds such an artifact."""
    return (Path(path) / MANIFEST).is_file() and read_manifest(path).kind == KIND


def load_rag(path: str | Path, device: str = "cpu", dtype: str = "float32") -> RagModel:
    """Load an artifact of `luban rag train`. Raises ArtifactError for anything else or a damaged one."""
    config = open_artifact(path, KIND).config
    encoder = Path(path) / QUESTIONS
    marginal = config["marginal"]
    if marginal not in ("sequence", "token"):
        raise DataError(f"{path}: marginal is sequence or token, {marginal!r} given")
    return RagModel(
        generator=Generator(load_model(Path(path) / GENERATOR, device, dtype)),
        questions=TextEncoder.load(encoder, device) if encoder.is_dir() else None,
        marginal=cast(Marginal, marginal),
        k=config["k"],
        temperature=config["temperature"],
        passage_encoder=config["passage_encoder"],
    )
