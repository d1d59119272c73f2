"""Re-ranking by a cross-encoder: question and passage are read together, which is slower and finer than comparing two vectors
(Nogueira and Cho 2019).

N pairs, T tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from luban.core.errors import UnsupportedError, UsageError
from luban.load.model import LoadedModel, load_model
from luban.models.head.rows import Classes
from luban.retrieval.fusion import Fusion
from luban.retrieval.index import Hit, Index, Retriever
from luban.retrieval.packaged import located

DEPTH = 50  # passages of the first search that are read
ROWS = 32  # pairs read together


class CrossEncoder:
    """Scores passages for a question.

    Args:
        model: an encoder with a head of one class and a vocabulary that joins two texts, such as those that
            sentence-transformers calls cross-encoders.

    Raises:
        UnsupportedError: another model.
        DataError: a vocabulary that doesn't say how two texts are joined.
    """

    def __init__(self, model: LoadedModel):
        head = model.spec.head
        if model.spec.body.causal or not isinstance(head, Classes) or head.count != 1:
            raise UnsupportedError(
                f"{model.name} is no cross-encoder, which is an encoder with one class: train one with luban rag train "
                "minilm_reranker_cpu"
            )
        self.model, self.tokenizer = model, model.need_tokenizer()
        self.tokenizer.pair([], [])

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", dtype: str = "float32") -> CrossEncoder:
        """By path. Raises ArtifactError where there is none, and what `load_model` does."""
        model = load_model(located(path, "cross-encoder"), device, dtype)
        return cls(replace(model, name=Path(path).resolve().name))

    def pair(self, question: Sequence[int], passage: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids and segments of a pair; the passage, then the question, is cut where the context is too short."""
        spare = self.model.spec.context - len(self.tokenizer.pair([], [])[0])
        question = question[:spare]
        return self.tokenizer.pair(question, passage[: spare - len(question)])

    def logits(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """(N,) scores of pairs from `pair` that are read together, with gradients where they are enabled."""
        device = next(self.model.module.parameters()).device
        longest = max(len(ids) for ids, _ in pairs)
        tokens_NT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids, _ in pairs], device=device)
        segments_NT = torch.tensor([[*of, *[0] * (longest - len(of))] for _, of in pairs], device=device)
        lengths_N = torch.tensor([len(ids) for ids, _ in pairs], device=device)
        mask_NT = torch.arange(longest, device=device) < lengths_N[:, None]
        segments = segments_NT if getattr(self.model.spec.body, "segments", 0) else None
        return self.model.module(tokens_NT, mask_NT, segments=segments).float().squeeze(-1)

    @torch.inference_mode()
    def scores(self, question: str, passages: Sequence[str]) -> np.ndarray:
        """(N,) float32, the larger the better the passage answers the question."""
        (asked,) = self.tokenizer.encode_batch([question])
        pairs = [self.pair(asked, ids) for ids in self.tokenizer.encode_batch(list(passages))]
        order = sorted(range(len(pairs)), key=lambda place: len(pairs[place][0]))
        found = np.empty(len(pairs), np.float32)
        for first in range(0, len(order), ROWS):
            rows = order[first : first + ROWS]
            found[rows] = self.logits([pairs[row] for row in rows]).cpu().numpy()
        return found


class Reranked:
    """An index whose best passages are put in another order by a cross-encoder.

    Args:
        depth: passages of the first search that it reads.
    """

    def __init__(self, index: Index, encoder: CrossEncoder, depth: int = DEPTH):
        if depth < 1:
            raise UsageError(f"depth: at least 1 passage is needed, {depth} asked for")
        self.index, self.encoder, self.depth = index, encoder, depth

    def search(
        self,
        query: str,
        k: int = 5,
        *,
        retriever: Retriever | None = None,
        fusion: Fusion = "zscore",
        exact: bool = False,
    ) -> list[Hit]:
        """The k best passages, best first, with the cross-encoder's scores. See `Index.search`."""
        hits = self.index.search(query, max(k, self.depth), retriever=retriever, fusion=fusion, exact=exact)
        if not hits:
            return []
        scores = self.encoder.scores(query, [hit.passage.titled for hit in hits])
        order = np.argsort(-scores, kind="stable")[:k]
        return [replace(hits[place], score=float(scores[place])) for place in order.tolist()]


def reranked(index: Index, encoder: str | None, device: str = "cpu", depth: int = DEPTH) -> Reranked | None:
    """The index with the cross-encoder at a path; None without one."""
    return None if encoder is None else Reranked(index, CrossEncoder.load(encoder, device), depth)
